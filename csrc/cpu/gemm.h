// Matrix products of a tile of rows, kept in cache, with a right operand that was packed once: C [rows, n] (+)= A [rows, k] B [k, n].
// Included inside the namespace of the instruction set.
//
// B lies in panels of kPanel columns, [panel][tap][k][kPanel]: the micro-kernel reads it front to back. A lies in rows; its leading
// dimension keeps neighbouring rows out of one another's cache sets. Sums are always taken in the order of k.

constexpr int64_t kPanel = 2 * kWidth;
// k of one pass: a panel of B, 32 KiB at most, stays in the first-level cache while all rows of the tile go by
constexpr int64_t kBlock = 256;
constexpr int64_t kSpare = 16;
// columns of a second product that are computed before they are written: each row's in one piece, as memory likes it
constexpr int64_t kGroupColumns = 256;
// most pixels of a tile, and of one that is not made of Winograd's patches
constexpr int64_t kTilePixels = 256;
constexpr int64_t kForwardPixels = 128;

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

template <class Op, int kRows>
void micro_kernel(
    const typename Op::Unit* __restrict a, int64_t lda, const typename Op::Unit* __restrict b, int64_t k,
    float* __restrict c, int64_t ldc, bool accumulate) {
  Vec sum[kRows][2];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    sum[i][0] = accumulate ? load(c + i * ldc) : zero();
    sum[i][1] = accumulate ? load(c + i * ldc + kWidth) : zero();
  }
  for (int64_t p = 0; p < k; ++p) {
    const Vec b0 = Op::columns(b + p * kPanel), b1 = Op::columns(b + p * kPanel + kWidth);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const Vec value = Op::broadcast(a[i * lda + p]);
      sum[i][0] = Op::step(value, b0, sum[i][0]);
      sum[i][1] = Op::step(value, b1, sum[i][1]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    store(c + i * ldc, sum[i][0]);
    store(c + i * ldc + kWidth, sum[i][1]);
  }
}

// One panel of C from all rows of A, in steps of rows as equal as can be.
template <class Op>
void multiply_rows(
    int64_t rows, const typename Op::Unit* a, int64_t lda, const typename Op::Unit* b, int64_t k, float* c, int64_t ldc,
    bool accumulate) {
  using Kernel = decltype(&micro_kernel<Op, 1>);
  static constexpr Kernel kernels[] = {
      nullptr,
      micro_kernel<Op, 1>, micro_kernel<Op, 2>, micro_kernel<Op, 3>,
      micro_kernel<Op, 4>, micro_kernel<Op, 5>, micro_kernel<Op, 6>,
#if defined(SVF_TWELVE_ROWS)
      micro_kernel<Op, 7>, micro_kernel<Op, 8>, micro_kernel<Op, 9>,
      micro_kernel<Op, 10>, micro_kernel<Op, 11>, micro_kernel<Op, 12>,
#endif
  };
  const int64_t steps = (rows + kMicroRows - 1) / kMicroRows;
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t first = rows * i / steps, end = rows * (i + 1) / steps;
    kernels[end - first](a + first * lda, lda, b, k, c + first * ldc, ldc, accumulate);
  }
}

// Operands in single precision: one element a step.
struct Single {
  using Unit = float;
  // elements of k in a unit; the multiple of units that rows are filled up to with zeros; the multiple of rows that is computed
  static constexpr int64_t kElements = 1, kStep = 1, kRows = 1;
  static Vec broadcast(Unit a) { return set(a); }
  static Vec columns(const Unit* b) { return load(b); }
  static Vec step(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
  static void multiply(
      int64_t rows, const Unit* a, int64_t lda, const Unit* b, int64_t k, float* c, int64_t ldc, bool accumulate) {
    multiply_rows<Single>(rows, a, lda, b, k, c, ldc, accumulate);
  }
};

template <class Op>
constexpr int64_t units(int64_t k) {
  return round_up((k + Op::kElements - 1) / Op::kElements, Op::kStep);
}

template <class F>
void in_parallel(const Threads& threads, int64_t count, const F& body) {
  threads.parallel_for(count, const_cast<F*>(&body), [](void* context, int64_t begin, int64_t end) {
    (*static_cast<const F*>(context))(begin, end);
  });
}

// C [rows, columns] (+)= A B for one block of k that begins at unit `first` of `all_units`; C's columns are padded to whole panels.
template <class Op>
void multiply_block(
    int64_t rows, const typename Op::Unit* a, int64_t lda, const typename Op::Unit* b, int64_t first, int64_t count,
    int64_t all_units, int64_t columns, float* c, int64_t ldc, bool accumulate) {
  for (int64_t column = 0; column < columns; column += kPanel) {
    const auto* panel = b + (column * all_units + first * kPanel);
    Op::multiply(rows, a, lda, panel, count, c + column, ldc, accumulate);
  }
}

// One panel of C [rows, kPanel], beginning at `column`, from rows that are there in full.
template <class Op>
void multiply_full(
    int64_t rows, const typename Op::Unit* a, int64_t lda, const typename Op::Unit* b, int64_t all_units, int64_t column,
    float* c, int64_t ldc) {
  for (int64_t first = 0; first < all_units; first += kBlock) {
    const int64_t count = all_units - first < kBlock ? all_units - first : kBlock;
    Op::multiply(rows, a + first, lda, b + column * all_units + first * kPanel, count, c, ldc, first > 0);
  }
}
