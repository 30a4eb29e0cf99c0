// Products of bfloat16 in tile registers: AMX. Included inside the namespace of the instruction set.

// The shapes of all eight tile registers, 16 rows of 64 bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileShapes kTileShapes;

// 32 rows and one panel of 32 columns: two by two accumulators, 16 pairs of k a step.
struct Half {
  using Unit = uint32_t;
  static constexpr int64_t kElements = 2, kStep = 16, kRows = 32;
  static void multiply(
      int64_t rows, const Unit* a, int64_t lda, const Unit* b, int64_t k, float* c, int64_t ldc, bool accumulate) {
    // the compiler does not know that tiles are loaded from memory: everything is stored first
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(&kTileShapes);
    for (int64_t i = 0; i < rows; i += kRows, a += kRows * lda, c += kRows * ldc) {
      if (accumulate) {
        _tile_loadd(0, c, 4 * ldc);
        _tile_loadd(1, c + 16, 4 * ldc);
        _tile_loadd(2, c + 16 * ldc, 4 * ldc);
        _tile_loadd(3, c + 16 * ldc + 16, 4 * ldc);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t p = 0; p < k; p += kStep) {
        _tile_loadd(4, a + p, 4 * lda);
        _tile_loadd(5, a + 16 * lda + p, 4 * lda);
        _tile_loadd(6, b + p * kPanel, 4 * kPanel);
        _tile_loadd(7, b + p * kPanel + 16, 4 * kPanel);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c, 4 * ldc);
      _tile_stored(1, c + 16, 4 * ldc);
      _tile_stored(2, c + 16 * ldc, 4 * ldc);
      _tile_stored(3, c + 16 * ldc + 16, 4 * ldc);
    }
  }
};
