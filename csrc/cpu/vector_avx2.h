// Eight floats: AVX2 and FMA. Included inside the namespace of the instruction set, behind its target pragma.

constexpr int kWidth = 8;
// rows of a micro-kernel: 6 x 2 accumulators, two columns of the right operand and one broadcast fill 16 registers
constexpr int kMicroRows = 6;

using Vec = __m256;
using Bits = __m256i;

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec set(float x) { return _mm256_set1_ps(x); }
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec floor(Vec a) { return _mm256_floor_ps(a); }
// the second where either is NaN
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
// NaN where either is
inline Vec largest_of(Vec a, Vec b) { return _mm256_blendv_ps(max(b, a), b, _mm256_cmp_ps(b, b, _CMP_UNORD_Q)); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }

// one bit an element, the lowest first
inline uint32_t nonzero_bits(Vec a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, zero(), _CMP_NEQ_UQ)); }
inline Vec keep_bits(Vec a, uint32_t bits) {
  const Bits lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const Bits chosen = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
  return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, lane)));
}
// a where a > best or a is NaN, and likewise of the integers beside them; a NaN stays
inline void keep_larger(Vec a, int32_t index, Vec& best, Bits& winner) {
  const Vec wins = _mm256_or_ps(_mm256_cmp_ps(a, best, _CMP_GT_OQ), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  best = _mm256_blendv_ps(best, a, wins);
  winner = _mm256_blendv_epi8(winner, _mm256_set1_epi32(index), _mm256_castps_si256(wins));
}

inline Bits load_bits(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_bits(int32_t* p, Bits v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

inline Vec load_bfloat16(const uint16_t* p) {
  const Bits wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
// to nearest even; NaN stays
inline void store_bfloat16(uint16_t* p, Vec v) {
  const Bits raw = _mm256_castps_si256(v);
  const Bits odd = _mm256_and_si256(_mm256_srli_epi32(raw, 16), _mm256_set1_epi32(1));
  Bits rounded = _mm256_add_epi32(raw, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const Vec nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), _mm256_castps_si256(nan));
  rounded = _mm256_srli_epi32(rounded, 16);
  const Bits packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline Vec load_int8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// of whole numbers from -127 to 127
inline void store_int8(int8_t* p, Vec v) {
  const Bits wide = _mm256_cvtps_epi32(v);
  const Bits words = _mm256_packs_epi32(wide, wide);
  const Bits bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words, words), _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(bytes));
}

// lowbias32 of first, first + 1, ..., as 24 bits of fraction in [0, 1)
inline Vec noise(uint32_t first) {
  Bits x = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 16)), _mm256_set1_epi32(0x7FEB352D));
  x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 15)), _mm256_set1_epi32(static_cast<int>(0x846CA68B)));
  x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
  return mul(_mm256_cvtepi32_ps(_mm256_srli_epi32(x, 8)), set(0x1p-24f));
}
