// Right operands of products, packed once for the micro-kernels (gemm.h has the layout). Included inside the namespace of the
// instruction set.

template <class Op>
size_t packed_bytes(const Matrix& m) {
  return sizeof(typename Op::Unit) * m.taps * round_up(m.n, kPanel) * units<Op>(m.k);
}

inline float widen(uint16_t half) {
  const uint32_t raw = static_cast<uint32_t>(half) << 16;
  float value;
  __builtin_memcpy(&value, &raw, sizeof value);
  return value;
}
// to nearest even; factors are finite
inline uint16_t narrow(float value) {
  uint32_t raw;
  __builtin_memcpy(&raw, &value, sizeof raw);
  return static_cast<uint16_t>((raw + 0x7FFF + (raw >> 16 & 1)) >> 16);
}

inline float element(const Matrix& m, int64_t tap, int64_t k, int64_t n) {
  if (k >= m.k || n >= m.n) return 0.0f;
  const int64_t at = tap * m.tap_stride + k * m.k_stride + n * m.n_stride;
  return m.type == Type::kFloat ? static_cast<const float*>(m.data)[at] : widen(static_cast<const uint16_t*>(m.data)[at]);
}

inline void put(float* out, const Matrix& m, int64_t tap, int64_t k, int64_t n) { *out = element(m, tap, k, n); }
inline void put(uint32_t* out, const Matrix& m, int64_t tap, int64_t k, int64_t n) {
  *out = narrow(element(m, tap, 2 * k, n)) | static_cast<uint32_t>(narrow(element(m, tap, 2 * k + 1, n))) << 16;
}

template <class Op>
void pack(const Matrix& m, void* out, const Threads& threads) {
  auto* to = static_cast<typename Op::Unit*>(out);
  const int64_t panels = round_up(m.n, kPanel) / kPanel, all = units<Op>(m.k);
  in_parallel(threads, m.taps * panels, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t k = 0; k < all; ++k)
        for (int64_t j = 0; j < kPanel; ++j)
          put(to + (i * all + k) * kPanel + j, m, i % m.taps, k, i / m.taps * kPanel + j);
  });
}
