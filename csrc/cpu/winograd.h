// 3x3 convolutions of stride 1 as Winograd's F(2x2, 3x3): 16 products for the four outputs of a 2x2 patch where the sum over taps
// takes 36 (S. Winograd, 1980; A. Lavin and S. Gray, CVPR 2016). A dilated convolution is as many plain ones on the interleaved
// grids of its phases. Transforms and products run in single precision; an infinity may become NaN in its patches. Included inside the namespace of the instruction set.

constexpr int64_t kPositions = 16;
// patches of a tile at most: four pixels each
constexpr int64_t kPatches = kTilePixels / 4;

// First output of each patch along one axis, phase after phase of the dilation.
struct Patches {
  int64_t extent, dilation, count = 0;

  Patches(int64_t extent, int64_t dilation) : extent(extent), dilation(dilation) {
    for (int64_t phase = 0; phase < dilation; ++phase) count += of_phase(phase);
  }
  int64_t of_phase(int64_t phase) const {
    return phase < extent ? ((extent - phase + dilation - 1) / dilation + 1) / 2 : 0;
  }
  int64_t origin(int64_t patch) const {
    int64_t phase = 0;
    for (; patch >= of_phase(phase); ++phase) patch -= of_phase(phase);
    return phase + 2 * dilation * patch;
  }
};

// Bᵀ d of four values d.
inline void transform_inputs(const Vec d0, const Vec d1, const Vec d2, const Vec d3, Vec* t) {
  t[0] = sub(d0, d2), t[1] = add(d1, d2), t[2] = sub(d2, d1), t[3] = sub(d1, d3);
}

// The 16 rows of a patch's input, `count` channels from `first` on, transformed: position p goes to a + p * step.
template <class T>
void transform_patch(const T* const* rows, int64_t first, int64_t count, float* a, int64_t step) {
  for (int64_t c = 0; c < count; c += kWidth) {
    Vec t[4][4];
    for (int j = 0; j < 4; ++j) {
      Vec d[4], column[4];
      for (int i = 0; i < 4; ++i) d[i] = read(rows[4 * i + j] + first + c, count - c);
      transform_inputs(d[0], d[1], d[2], d[3], column);
      for (int i = 0; i < 4; ++i) t[i][j] = column[i];
    }
    for (int i = 0; i < 4; ++i) {
      Vec row[4];
      transform_inputs(t[i][0], t[i][1], t[i][2], t[i][3], row);
      for (int j = 0; j < 4; ++j) store(a + (4 * i + j) * step + c, row[j]);
    }
  }
}

// One patch of products m (position p at m + p * step), as the 2x2 outputs Aᵀ m A; `to` null where an output lies outside.
inline void transform_products(const float* m, int64_t step, int64_t columns, float* const* to) {
  for (int64_t c = 0; c < columns; c += kWidth) {
    Vec t[2][4];
    for (int j = 0; j < 4; ++j) {
      const Vec m0 = load(m + j * step + c), m1 = load(m + (4 + j) * step + c);
      const Vec m2 = load(m + (8 + j) * step + c), m3 = load(m + (12 + j) * step + c);
      t[0][j] = add(add(m0, m1), m2), t[1][j] = sub(sub(m1, m2), m3);
    }
    for (int i = 0; i < 2; ++i) {
      if (to[2 * i] != nullptr) store(to[2 * i] + c, add(add(t[i][0], t[i][1]), t[i][2]));
      if (to[2 * i + 1] != nullptr) store(to[2 * i + 1] + c, sub(sub(t[i][1], t[i][2]), t[i][3]));
    }
  }
}

// sums = the convolution at the pixels of patches [first, first + number), and which pixels those are.
template <class T>
void winograd_tile(const Forward& f, int64_t first, int64_t number, const Buffers<Single>& tile, Pixels& pixels) {
  const Geometry& g = f.geometry;
  const Patches down(g.out[0], g.dilation[0]), across(g.out[1], g.dilation[1]);
  const int64_t ldm = leading(f.rank), step = number * tile.lda, step_m = number * ldm;
  auto* a = static_cast<float*>(scratch(4, kPositions * step * sizeof(float)));
  auto* m = static_cast<float*>(scratch(5, kPositions * step_m * sizeof(float)));
  auto* nothing = static_cast<T*>(scratch(6, f.inputs * sizeof(T)));
  __builtin_memset(nothing, 0, f.inputs * sizeof(T));

  const T* rows[kPatches][kPositions];
  float* to[kPatches][4];
  pixels.count = 0;
  for (int64_t i = 0; i < number; ++i) {
    const int64_t patch = first + i, n = patch / (down.count * across.count);
    const int64_t y = down.origin(patch / across.count % down.count), x = across.origin(patch % across.count);
    for (int p = 0; p < kPositions; ++p) {
      const int64_t in_y = y - g.padding[0] + p / 4 * g.dilation[0], in_x = x - g.padding[1] + p % 4 * g.dilation[1];
      const bool is_inside = in_y >= 0 && in_y < g.in[0] && in_x >= 0 && in_x < g.in[1];
      rows[i][p] = is_inside ? at<const T>(f.x, n, in_y, in_x) : nothing;
    }
    for (int o = 0; o < 4; ++o) {
      const int64_t out_y = y + o / 2 * g.dilation[0], out_x = x + o % 2 * g.dilation[1];
      const bool is_inside = out_y < g.out[0] && out_x < g.out[1];
      to[i][o] = is_inside ? tile.sums + pixels.count * tile.lds : nullptr;
      if (is_inside) pixels.add((n * g.out[0] + out_y) * g.out[1] + out_x, n, out_y, out_x);
    }
  }
  for (int64_t channel = 0; channel < f.inputs; channel += kBlock) {
    const int64_t count = f.inputs - channel < kBlock ? f.inputs - channel : kBlock;
    for (int64_t i = 0; i < number; ++i) transform_patch(rows[i], channel, count, a + i * tile.lda, step);
    for (int64_t p = 0; p < kPositions; ++p)
      multiply_block<Single>(
          number, a + p * step, tile.lda, static_cast<const float*>(f.right), p * f.inputs + channel, count,
          kPositions * f.inputs, f.rank, m + p * step_m, ldm, channel > 0);
  }
  for (int64_t i = 0; i < number; ++i) transform_products(m + i * ldm, step_m, f.rank, to[i]);
}
