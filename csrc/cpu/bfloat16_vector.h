// Products of bfloat16 in vectors: AVX-512 BF16. Included inside the namespace of the instruction set.

// Two neighbours of k a step, summed in single precision.
struct Half {
  using Unit = uint32_t;
  static constexpr int64_t kElements = 2, kStep = 1, kRows = 1;
  static Vec broadcast(Unit a) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(a))); }
  static Vec columns(const Unit* b) { return _mm512_castsi512_ps(_mm512_loadu_si512(b)); }
  static Vec step(Vec a, Vec b, Vec sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static void multiply(
      int64_t rows, const Unit* a, int64_t lda, const Unit* b, int64_t k, float* c, int64_t ldc, bool accumulate) {
    multiply_rows<Half>(rows, a, lda, b, k, c, ldc, accumulate);
  }
};
