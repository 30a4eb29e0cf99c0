// z as it is kept for backward: in full, or as int8 with one scale a channel and group of pixels and dither (quantize.py has the
// rule). Included inside the namespace of the instruction set.

constexpr uint32_t kNoiseLength = 1048573;
constexpr float kLevels = 127.0f;

// Noise of the elements from index `at` (below kNoiseLength) on; the table of the rule begins anew at its end.
inline Vec noise_at(uint32_t at) {
  if (at + kWidth <= kNoiseLength) return noise(at);
  float part[2 * kWidth];
  const uint32_t ahead = kNoiseLength - at;
  store(part, noise(at));
  store(part + ahead, noise(0));
  return load(part);
}

// int8 levels of a tile of z [rows, rank] that begins at pixel `first`, a multiple of a group.
template <class T>
void quantize_tile(const T* z, int64_t ldz, int64_t rows, int64_t rank, int64_t first, int8_t* q, float* scale) {
  for (int64_t group = 0; group < rows; group += kGroupPixels) {
    const int64_t end = rows - group < kGroupPixels ? rows : group + kGroupPixels;
    float* group_scale = scale + (first + group) / kGroupPixels * rank;
    for (int64_t c = 0; c < rank; c += kWidth) {
      Vec largest = zero();
      for (int64_t i = group; i < end; ++i) largest = largest_of(largest, abs(read(z + i * ldz + c, rank - c)));
      write(group_scale + c, mul(largest, set(1 / kLevels)), rank - c);
      const Vec positive = max(largest, set(0x1p-126f));
      const Vec factor = keep_bits(div(set(kLevels), positive), nonzero_bits(largest));
      for (int64_t i = group; i < end; ++i) {
        const int64_t index = (first + i) * rank + c;
        Vec level = floor(fma(read(z + i * ldz + c, rank - c), factor, noise_at(static_cast<uint32_t>(index % kNoiseLength))));
        level = min(set(kLevels), max(set(-kLevels), level));
        write(q + index, level, rank - c);
      }
    }
  }
}

// sum = Σ z ⊙ g over the pixels of a tile; g [pixels, rank] with leading dimension ldg.
template <class Z>
void add_products(const Backward& b, const float* g, int64_t ldg, const Pixels& pixels, float* sum) {
  const int64_t rank = b.rank;
  for (int64_t c = 0; c < rank; c += kWidth) {
    Vec total = zero();
    for (int64_t i = 0; i < pixels.count; ++i) {
      const int64_t pixel = pixels.number[i];
      Vec value = read(static_cast<const Z*>(b.z) + pixel * rank + c, rank - c);
      if constexpr (sizeof(Z) == 1) {
        const auto at = static_cast<uint32_t>((pixel * rank + c) % kNoiseLength);
        const float* scale = b.z_scale + pixel / kGroupPixels * b.z_scale_step + c;
        value = mul(add(sub(value, noise_at(at)), set(0.5f)), read(scale, rank - c));
      }
      total = fma(value, load(g + i * ldg + c), total);
    }
    write(sum + c, total, rank - c);
  }
}

// z that was made elsewhere as int8.
template <class T>
void quantize_of(const Quantize& q, const Threads& threads) {
  in_parallel(threads, (q.pixels + kGroupPixels - 1) / kGroupPixels, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kGroupPixels, last = end * kGroupPixels < q.pixels ? end * kGroupPixels : q.pixels;
    quantize_tile(static_cast<const T*>(q.z) + first * q.rank, q.rank, last - first, q.rank, first, q.q, q.scale);
  });
}
