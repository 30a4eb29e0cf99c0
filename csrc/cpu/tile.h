// A tile of pixels: its buffers, and the V-convolution of one tile as matrix products, tap by tap. Included inside the namespace of
// the instruction set.

// Leading dimension of a tile's rows with so many columns.
inline int64_t leading(int64_t columns) { return round_up(columns, kPanel) + kSpare; }

// Buffers of one tile: sums [rows, columns], a block of the left operand of the first product, the whole left operand of the
// second, a group of columns of its result.
template <class Op>
struct Buffers {
  using Unit = typename Op::Unit;
  int64_t lds, lda = kBlock + kSpare, ldl, ldp = kGroupColumns + kSpare;
  float* sums;
  Unit *block, *left;
  float* product;

  Buffers(int64_t rows, int64_t columns) : lds(leading(columns)), ldl(units<Op>(columns) + kSpare) {
    rows = round_up(rows, Op::kRows);
    sums = static_cast<float*>(scratch(0, rows * lds * sizeof(float)));
    block = static_cast<Unit*>(scratch(1, rows * lda * sizeof(Unit)));
    product = static_cast<float*>(scratch(2, rows * ldp * sizeof(float)));
    if constexpr (Op::kElements == 1) {
      // single precision is weighted where it is
      left = reinterpret_cast<Unit*>(sums), ldl = lds;
    } else {
      left = static_cast<Unit*>(scratch(3, rows * ldl * sizeof(Unit)));
    }
  }

  // left = factor ⊙ sums, of sums rounded to T: a z that was kept gives the same bits
  template <class T>
  void weigh(int64_t rows, int64_t columns, const float* factor) const {
    for (int64_t i = 0; i < rows; ++i) weighted<T>(sums + i * lds, factor, columns, left + i * ldl);
  }
};

// sums = Σ over taps of the rows that `row_of(tap_y, tap_x, i)` names (null: zeros) times that tap's matrix [inputs, columns].
template <class Op, class T, class RowOf>
void convolve_tile(
    const Geometry& g, int64_t rows, int64_t inputs, int64_t columns, const void* right, const Buffers<Op>& tile,
    const RowOf& row_of) {
  const T* row[kTilePixels];
  const int64_t all = units<Op>(inputs), tap_units = all * round_up(columns, kPanel);
  const auto* b = static_cast<const typename Op::Unit*>(right);
  bool has_begun = false;
  for (int64_t ky = 0; ky < g.taps[0]; ++ky)
    for (int64_t kx = 0; kx < g.taps[1]; ++kx, b += tap_units) {
      bool is_inside = false;
      for (int64_t i = 0; i < rows; ++i) is_inside |= (row[i] = row_of(ky, kx, i)) != nullptr;
      if (!is_inside) continue;
      for (int64_t first = 0; first < all; first += kBlock) {
        const int64_t count = all - first < kBlock ? all - first : kBlock, channel = first * Op::kElements;
        const int64_t channels = inputs - channel < kBlock * Op::kElements ? inputs - channel : kBlock * Op::kElements;
        gather(row, rows, channel, channels, tile.block, tile.lda);
        multiply_block<Op>(rows, tile.block, tile.lda, b, first, count, all, columns, tile.sums, tile.lds, has_begun);
        has_begun = true;
      }
    }
  if (!has_begun) __builtin_memset(tile.sums, 0, rows * tile.lds * sizeof(float));
}
