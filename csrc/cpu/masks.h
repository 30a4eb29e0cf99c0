// Masks of dense values in memory order: one bit an element, the lowest first. Included inside the namespace of the instruction set.

template <class T>
void pack_mask_of(const Masked& m, const Threads& threads) {
  const T* values = static_cast<const T*>(m.values);
  in_parallel(threads, (m.count + 7) / 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      m.mask[i] = static_cast<uint8_t>(nonzero_bits(read(values + 8 * i, m.count - 8 * i < 8 ? m.count - 8 * i : 8)));
  });
}

template <class T>
void keep_masked_of(const Masked& m, const Threads& threads) {
  const T* values = static_cast<const T*>(m.values);
  T* out = static_cast<T*>(m.out);
  in_parallel(threads, (m.count + kWidth - 1) / kWidth, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kWidth; i < end * kWidth && i < m.count; i += kWidth)
      write(out + i, keep_bits(read(values + i, m.count - i), read_bits(m.mask, i, m.count - i)), m.count - i);
  });
}
