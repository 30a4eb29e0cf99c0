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

// sums = Σ over taps of the rows that `row_of(tap_y, tap_x, i)` names (null: zeros) times that tap's matrix [inputs, columns]. The taps
// lie behind one another in the contraction, so that a block may hold several narrow ones.
template <class Op, class T, class RowOf>
void convolve_tile(
    const Geometry& g, int64_t rows, int64_t inputs, int64_t columns, const void* right, const Buffers<Op>& tile,
    const RowOf& row_of) {
  const T* row[kTilePixels];
  const int64_t each = units<Op>(inputs), all = g.taps[0] * g.taps[1] * each;
  int64_t tap_of_rows = -1;
  bool is_inside = false, has_begun = false;
  for (int64_t first = 0, at = 0; first < all; first = at) {
    while (at < all && at - first < kBlock) {
      const int64_t tap = at / each, unit = at % each;
      if (tap != tap_of_rows) {
        is_inside = false;
        for (int64_t i = 0; i < rows; ++i) is_inside |= (row[i] = row_of(tap / g.taps[1], tap % g.taps[1], i)) != nullptr;
        tap_of_rows = tap;
      }
      // a tap that meets padding alone ends the block
      if (!is_inside) break;
      const int64_t spare = first + kBlock - at, part = each - unit < spare ? each - unit : spare;
      const int64_t channel = unit * Op::kElements, left = inputs - channel;
      const int64_t channels = left < part * Op::kElements ? left : part * Op::kElements;
      gather(row, rows, channel, channels, tile.block + (at - first), tile.lda);
      at += part;
    }
    if (at > first) {
      multiply_block<Op>(
          rows, tile.block, tile.lda, static_cast<const typename Op::Unit*>(right), first, at - first, all, columns, tile.sums,
          tile.lds, has_begun);
      has_begun = true;
    }
    if (!is_inside) at = (tap_of_rows + 1) * each;
  }
  if (!has_begun) __builtin_memset(tile.sums, 0, rows * tile.lds * sizeof(float));
}
