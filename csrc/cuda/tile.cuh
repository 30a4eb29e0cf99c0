// Operands in shared memory and the products of a warp.
//
// A panel is rows of 128 bytes: 64 half-precision or 32 float32 elements. Its eight 16-byte chunks are permuted in each row, so that a
// column of chunks (ldmatrix), and 8 columns of 4 rows (the float32 operand that is read element by element), lie in different banks.
// Both half precisions and TF32 then load operands by the same instructions: 32 bytes of the contraction are one step of mma.sync.
#pragma once

#include "numbers.cuh"

namespace svf::cuda {

constexpr int kPanelBytes = 128;
constexpr int kSteps = kPanelBytes / 32;

// Elements in a row of a panel.
template <class T>
constexpr int kDepth = kPanelBytes / static_cast<int>(sizeof(T));

__device__ __forceinline__ uint32_t chunk_of(uint32_t panel, int row, int chunk) {
  const int turn = ((row & 3) << 1) | ((row >> 2) & 1);
  return panel + row * kPanelBytes + ((chunk ^ turn) << 4);
}

// The threads that do something together: their numbers, and a barrier of their own.
template <int THREADS>
struct BlockTeam {
  static constexpr int kThreads = THREADS;
  static __device__ __forceinline__ int index() { return threadIdx.x; }
  static __device__ __forceinline__ void sync() { ptx::sync_block(); }
};

// Blocks that a multiprocessor should hold at once, which registers are given out for: left to itself the compiler spills for the sake of
// more small blocks. 0 leaves it to the compiler.
template <Products P, int THREADS>
constexpr int kResident = THREADS == 128 ? 3 : P == Products::kTf32x3 ? 1 : 0;

// Where rows begin, in elements; -1 for a row that does not exist.
struct MatrixRows {
  int first, count;
  int64_t step;

  __device__ __forceinline__ int64_t operator()(int row) const {
    return first + row < count ? (first + row) * step : -1;
  }
};

// Offsets of a block's pixels, looked up rather than divided for again and again.
struct PixelRows {
  uint32_t table;

  __device__ __forceinline__ int64_t operator()(int row) const { return ptx::load_shared<int64_t>(table + 8 * row); }
};

// Fills a table of ROWS offsets; read it after a barrier.
template <int ROWS, int THREADS>
__device__ __forceinline__ PixelRows tabulate(uint32_t table, const Picture& picture, const Extent& extent, int first) {
  for (int row = threadIdx.x; row < ROWS; row += THREADS) {
    const int pixel = first + row;
    int64_t offset = -1;
    if (pixel < extent.pixels) {
      const int in_plane = pixel % extent.plane;
      offset = pixel / extent.plane * picture.n + in_plane / extent.width * picture.h + in_plane % extent.width * picture.w;
    }
    ptx::store_shared(table + 8 * row, offset);
  }
  return {table};
}

// Up to a vector of elements, one by one, zeros after the `count`-th.
template <class T>
__device__ __forceinline__ Vector16 gather(const T* from, int count) {
  float value[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    value[i] = i < count ? to_float(ptx::load_global(from + i)) : 0.0f;
  }
  return pack_vector<T>(value);
}

// Elements of the chunk that begins at `column` which exist.
template <class T>
__device__ __forceinline__ int chunk_elements(int64_t offset, int column, int columns) {
  return offset < 0 ? 0 : max(0, min(columns - column, kVector<T>));
}

// Starts copying a panel of ROWS rows from `column` on, zeros where there is nothing. Each thread copies the same chunks every time.
template <class T, int ROWS, int THREADS, class Rows>
__device__ __forceinline__ void copy_panel(uint32_t panel, const T* source, const Rows& rows, int column, int columns,
                                           bool is_aligned) {
  static_assert(ROWS * 8 % THREADS == 0);
  const int chunk = threadIdx.x % 8;
  column += chunk * kVector<T>;
  if (is_aligned) {
#pragma unroll
    for (int row = 0; row < ROWS; row += THREADS / 8) {
      const int own = row + threadIdx.x / 8;
      const int64_t offset = rows(own);
      const int count = chunk_elements<T>(offset, column, columns);
      ptx::copy_async(chunk_of(panel, own, chunk), source + (count > 0 ? offset + column : 0), count * sizeof(T));
    }
  } else {
#pragma unroll 1
    for (int row = threadIdx.x / 8; row < ROWS; row += THREADS / 8) {
      const int64_t offset = rows(row);
      const int count = chunk_elements<T>(offset, column, columns);
      ptx::store_shared(chunk_of(panel, row, chunk), gather(source + (count > 0 ? offset + column : 0), count));
    }
  }
}

// A factor's tile for one panel's depth of the contraction, from element `depth` on, for WIDTH columns of the product from `first` on.
// ACROSS false: the factor's rows are the product's columns (one panel of WIDTH rows). True: its rows are the contraction (panels of
// kDepth rows beside each other).
template <class T, int WIDTH, int THREADS, bool ACROSS>
__device__ __forceinline__ void copy_factor(uint32_t tile, const Matrix& factor, int first, int depth, bool is_aligned) {
  const auto* data = static_cast<const T*>(factor.data);
  if constexpr (ACROSS) {
    const MatrixRows rows{depth, factor.rows, factor.columns};
#pragma unroll
    for (int i = 0; i < WIDTH / kDepth<T>; ++i) {
      copy_panel<T, kDepth<T>, THREADS>(tile + i * kDepth<T> * kPanelBytes, data, rows, first + i * kDepth<T>,
                                        factor.columns, is_aligned);
    }
  } else {
    copy_panel<T, WIDTH, THREADS>(tile, data, MatrixRows{first, factor.rows, factor.columns}, depth, factor.columns,
                                  is_aligned);
  }
}

// Bytes of such a tile, whichever way it lies.
template <class T, int WIDTH>
constexpr int kFactorBytes = WIDTH * kPanelBytes;

// The operand of 16 columns from `n` on.
template <Products P, bool ACROSS>
__device__ __forceinline__ void load_columns(Operand<P>& b, uint32_t tile, int n, int step) {
  using T = typename ElementOf<P>::type;
  const int lane = threadIdx.x % 32;
  if constexpr (!ACROSS) {
    ptx::load_matrices(b.high, chunk_of(tile, n + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
  } else {
    const uint32_t panel = tile + n / kDepth<T> * (kDepth<T> * kPanelBytes);
    const int column = n % kDepth<T>;
    if constexpr (sizeof(T) == 2) {
      ptx::load_matrices_transposed(b.high, chunk_of(panel, 16 * step + lane % 16, column / 8 + lane / 16));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = column + i / 2 * 8 + lane / 4;
        b.high[i] = ptx::load_shared<uint32_t>(chunk_of(panel, 8 * step + i % 2 * 4 + lane % 4, at / 4) + at % 4 * 4);
      }
    }
  }
  b.round();
}

// A warp's part of a product tile [BM, BN]: 16 M × 8 N elements of it, and where they begin.
template <int BM, int BN, int WARPS_M, int WARPS_N>
struct WarpTile {
  static constexpr int kThreads = 32 * WARPS_M * WARPS_N;
  static constexpr int M = BM / WARPS_M / 16;
  static constexpr int N = BN / WARPS_N / 8;
  static_assert(M * 16 * WARPS_M == BM && N * 8 * WARPS_N == BN && N % 2 == 0);

  float sum[M][N][4];

  static __device__ __forceinline__ int row() { return threadIdx.x / 32 % WARPS_M * (16 * M); }
  static __device__ __forceinline__ int column() { return threadIdx.x / 32 / WARPS_M * (8 * N); }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < M * N * 4; ++i) {
      sum[i / (4 * N)][i / 4 % N][i % 4] = 0.0f;
    }
  }

  // += the product of one panel of rows and one factor tile.
  template <Products P, bool ACROSS>
  __device__ __forceinline__ void add(uint32_t panel, uint32_t factor) {
    const int lane = threadIdx.x % 32;
    // three products of all steps at once would not fit in the registers of the larger tiles
#pragma unroll (P == Products::kTf32x3 ? 1 : kSteps)
    for (int step = 0; step < kSteps; ++step) {
      Operand<P> a[M];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::load_matrices(a[m].high, chunk_of(panel, row() + 16 * m + lane % 16, 2 * step + lane / 16));
        a[m].round();
      }
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        Operand<P> b;
        load_columns<P, ACROSS>(b, factor, column() + 8 * n, step);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          multiply(sum[m][n], a[m], b, 0);
          multiply(sum[m][n + 1], a[m], b, 2);
        }
      }
    }
  }

  // Calls body(row, column, first, second) for each pair of adjacent elements, rows and columns those of the whole tile.
  template <class Body>
  __device__ __forceinline__ void for_pairs(Body body) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int column = WarpTile::column() + 8 * n + lane % 4 * 2;
        body(row() + 16 * m + lane / 4, column, sum[m][n][0], sum[m][n][1]);
        body(row() + 16 * m + lane / 4 + 8, column, sum[m][n][2], sum[m][n][3]);
      }
    }
  }
};

// Runs `count` steps through a ring of STAGES buffers of BYTES: copy(step, buffer) starts copies, prepare(step, buffer) sees those of its
// own thread, use(step, buffer) those of all. Ends with a barrier: the ring may then hold something else.
template <int STAGES, int BYTES, class Copy, class Prepare, class Use>
__device__ __forceinline__ void pipeline(uint32_t ring, int count, const Copy& copy, const Prepare& prepare, const Use& use) {
#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < count) {
      copy(step, ring + step * BYTES);
    }
    ptx::commit_copies();
  }
  int slot = 0;
#pragma unroll 1
  for (int step = 0; step < count; ++step) {
    const uint32_t buffer = ring + slot * BYTES;
    ptx::wait_copies<STAGES - 2>();
    prepare(step, buffer);
    ptx::sync_block();
    const int ahead = step + STAGES - 1;
    const int ahead_slot = slot == 0 ? STAGES - 1 : slot - 1;
    if (ahead < count) {
      copy(ahead, ring + ahead_slot * BYTES);
    }
    ptx::commit_copies();
    use(step, buffer);
    slot = slot + 1 == STAGES ? 0 : slot + 1;
  }
  ptx::wait_copies<0>();
  ptx::sync_block();
}

struct Nothing {
  __device__ __forceinline__ void operator()(int, uint32_t) const {}
};

// A float32 tile [rows, WIDTH] on its way from warps to rows of octets. The spare columns put rows into different banks.
template <int WIDTH>
struct Staging {
  static constexpr int kRowBytes = (WIDTH + 8) * 4;
  uint32_t at;

  static __host__ __device__ constexpr int bytes(int rows) { return rows * kRowBytes; }

  __device__ __forceinline__ void store(int row, int column, float first, float second) const {
    ptx::store_shared(at + row * kRowBytes + column * 4, Vector8{{ptx::to_bits(first), ptx::to_bits(second)}});
  }

  // Every second group of four lanes reads its halves the other way round, or two lanes would want one bank.
  __device__ __forceinline__ Octet load(int row, int octet) const {
    const int turn = threadIdx.x / 4 % 2;
    const uint32_t from = at + row * kRowBytes + octet * 32;
    const auto near = ptx::load_shared<Vector16>(from + 16 * turn);
    const auto far = ptx::load_shared<Vector16>(from + 16 * (1 - turn));
    Octet result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      result.value[i] = ptx::from_bits(turn ? far.word[i] : near.word[i]);
      result.value[4 + i] = ptx::from_bits(turn ? near.word[i] : far.word[i]);
    }
    return result;
  }
};

// A tile [rows, WIDTH] of T as panels beside each other: the left operand of a second product.
template <class T, int ROWS>
struct Panels {
  uint32_t at;

  static __host__ __device__ constexpr int bytes(int width) { return width / kDepth<T> * ROWS * kPanelBytes; }

  __device__ __forceinline__ uint32_t panel(int index) const { return at + index * ROWS * kPanelBytes; }

  __device__ __forceinline__ uint32_t chunk(int row, int column) const {
    return chunk_of(panel(column / kDepth<T>), row, column % kDepth<T> / kVector<T>);
  }

  __device__ __forceinline__ void store(int row, int column, float first, float second) const {
    const uint32_t to = chunk(row, column) + column % kVector<T> * sizeof(T);
    if constexpr (sizeof(T) == 2) {
      ptx::store_shared(to, Half<T>::pack(first, second));
    } else {
      ptx::store_shared(to, Vector8{{ptx::to_bits(first), ptx::to_bits(second)}});
    }
  }

  __device__ __forceinline__ Octet load(int row, int column) const {
    Octet octet;
#pragma unroll
    for (int i = 0; i < 8; i += kVector<T>) {
      unpack<T>(ptx::load_shared<Vector16>(chunk(row, column + i)), octet.value + i);
    }
    return octet;
  }

  __device__ __forceinline__ void store(int row, int column, const Octet& octet) const {
#pragma unroll
    for (int i = 0; i < 8; i += kVector<T>) {
      ptx::store_shared(chunk(row, column + i), pack_vector<T>(octet.value + i));
    }
  }
};

}  // namespace svf::cuda
