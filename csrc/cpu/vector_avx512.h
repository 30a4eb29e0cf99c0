// Sixteen floats: AVX-512 F, BW, DQ and VL. Included inside the namespace of the instruction set, behind its target pragma.

constexpr int kWidth = 16;
// rows of a micro-kernel: 12 x 2 accumulators, two columns of the right operand and one broadcast in 32 registers
constexpr int kMicroRows = 12;
#define SVF_TWELVE_ROWS

using Vec = __m512;
using Bits = __m512i;

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec set(float x) { return _mm512_set1_ps(x); }
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec floor(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
// the second where either is NaN
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
// NaN where either is
inline Vec largest_of(Vec a, Vec b) { return _mm512_mask_mov_ps(max(b, a), _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q), b); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }

// one bit an element, the lowest first
inline uint32_t nonzero_bits(Vec a) { return _mm512_cmp_ps_mask(a, zero(), _CMP_NEQ_UQ); }
inline Vec keep_bits(Vec a, uint32_t bits) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), a); }
// a where a > best or a is NaN, and likewise of the integers beside them; a NaN stays
inline void keep_larger(Vec a, int32_t index, Vec& best, Bits& winner) {
  const __mmask16 wins = _mm512_cmp_ps_mask(a, best, _CMP_GT_OQ) | _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  best = _mm512_mask_mov_ps(best, wins, a);
  winner = _mm512_mask_mov_epi32(winner, wins, _mm512_set1_epi32(index));
}

inline Bits load_bits(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store_bits(int32_t* p, Bits v) { _mm512_storeu_si512(p, v); }

inline Vec load_bfloat16(const uint16_t* p) {
  const Bits wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// to nearest even; NaN stays
inline void store_bfloat16(uint16_t* p, Vec v) {
  const Bits raw = _mm512_castps_si512(v);
  const Bits odd = _mm512_and_si512(_mm512_srli_epi32(raw, 16), _mm512_set1_epi32(1));
  Bits rounded = _mm512_add_epi32(raw, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline Vec load_int8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// of whole numbers from -127 to 127
inline void store_int8(int8_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}

// lowbias32 of first, first + 1, ..., as 24 bits of fraction in [0, 1)
inline Vec noise(uint32_t first) {
  const Bits lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  Bits x = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), lanes);
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32(0x7FEB352D));
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)), _mm512_set1_epi32(static_cast<int>(0x846CA68B)));
  x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
  return mul(_mm512_cvtepi32_ps(_mm512_srli_epi32(x, 8)), set(0x1p-24f));
}
