// Forward, tile by tile: a tile of z is made, kept, weighted by s and projected while it is in cache, and y is written once with
// shift, residual, ReLU and mask. Included inside the namespace of the instruction set.

constexpr int64_t kEvery[2] = {1, 1};

// Columns [column, column + width) of y from the sums of the last product: shift, residual, ReLU, mask.
template <class T>
void finish(
    const Forward& f, const float* sums, int64_t lds, const Pixels& pixels, int64_t column, int64_t width,
    T* const* residual) {
  // a mask whose rows begin within a byte is packed afterwards
  const bool has_bits = f.mask != nullptr && f.outputs % 8 == 0;
  for (int64_t i = 0; i < pixels.count; ++i) {
    const int64_t from = pixels.number[i] * f.outputs + column;
    T* y = static_cast<T*>(f.y) + from;
    for (int64_t c = 0; c < width; c += kWidth) {
      Vec v = load(sums + i * lds + c);
      if (f.shift != nullptr) v = add(v, read(f.shift + column + c, width - c));
      if (f.residual.data != nullptr) v = add(v, read(residual[i] + column + c, width - c));
      if (f.relu) v = max(zero(), v);
      write(y + c, v, width - c);
      // what rounds to zero is zero
      if (has_bits) write_bits(f.mask + (from + c) / 8, sizeof(T) == 2 ? read(y + c, width - c) : v, width - c);
    }
  }
}

// How a forward's output is dealt out: pixels, groups of pixels that share a scale, or patches. Nothing that is computed depends on
// it, so it may depend on the number of threads.
inline Tiling forward_tiles(const Forward& f, int64_t threads) {
  const Geometry& g = f.geometry;
  if (f.is_winograd)
    return deal_out(
        g.batch * Patches(g.out[0], g.dilation[0]).count * Patches(g.out[1], g.dilation[1]).count, kPatches, threads);
  if (f.z_scale != nullptr) return deal_out((g.out_pixels() + kGroupPixels - 1) / kGroupPixels, 2, threads);
  return deal_out(g.out_pixels(), kForwardPixels, threads);
}

// sums = z at a tile's pixels, and which pixels those are.
template <class Op, class T>
void make_z(const Forward& f, const Tiling& tiling, int64_t t, const Buffers<Op>& tile, Pixels& pixels) {
  const Geometry& g = f.geometry;
  if constexpr (Op::kElements == 1) {
    if (f.is_winograd) return winograd_tile<T>(f, tiling.begin(t), tiling.size(t), tile, pixels);
  }
  int64_t first = tiling.begin(t), end = tiling.begin(t + 1);
  if (f.z_scale != nullptr) {
    first *= kGroupPixels, end *= kGroupPixels;
    if (end > g.out_pixels()) end = g.out_pixels();
  }
  pixels.fill(first, end - first, g.out[0], g.out[1]);
  if (f.right == nullptr) {
    for (int64_t i = 0; i < pixels.count; ++i) {
      const T* row = at<T>(f.x, pixels.n[i], pixels.y[i], pixels.x[i]);
      for (int64_t c = 0; c < f.rank; c += kWidth) store(tile.sums + i * tile.lds + c, read(row + c, f.rank - c));
    }
    return;
  }
  convolve_tile<Op, T>(g, pixels.count, f.inputs, f.rank, f.right, tile, [&](int64_t ky, int64_t kx, int64_t i) -> const T* {
    const int64_t y = pixels.y[i] * g.stride[0] - g.padding[0] + ky * g.dilation[0];
    const int64_t x = pixels.x[i] * g.stride[1] - g.padding[1] + kx * g.dilation[1];
    const bool is_inside = y >= 0 && y < g.in[0] && x >= 0 && x < g.in[1];
    return is_inside ? at<const T>(f.x, pixels.n[i], y, x) : nullptr;
  });
}

template <class T>
void keep_z(const Forward& f, const float* sums, int64_t lds, const Pixels& pixels) {
  if (f.z_scale != nullptr)
    return quantize_tile(sums, lds, pixels.count, f.rank, pixels.number[0], static_cast<int8_t*>(f.z), f.z_scale);
  for (int64_t i = 0; i < pixels.count; ++i)
    for (int64_t c = 0; c < f.rank; c += kWidth)
      write(static_cast<T*>(f.z) + pixels.number[i] * f.rank + c, load(sums + i * lds + c), f.rank - c);
}

template <class Op, class T>
void forward_of(const Forward& f, const Threads& threads) {
  const Tiling tiling = forward_tiles(f, threads.count);
  const int64_t most = tiling.most * (f.is_winograd ? 4 : f.z_scale != nullptr ? kGroupPixels : 1);
  in_parallel(threads, tiling.tiles, [&](int64_t begin, int64_t end) {
    const Buffers<Op> tile(most, f.rank);
    Pixels pixels;
    T* residual[kTilePixels];
    for (int64_t t = begin; t < end; ++t) {
      make_z<Op, T>(f, tiling, t, tile, pixels);
      if (f.residual.data != nullptr) rows_at<T>(f.residual, pixels, kEvery, residual);
      if (f.z != nullptr) keep_z<T>(f, tile.sums, tile.lds, pixels);
      if (f.left != nullptr) tile.template weigh<T>(pixels.count, f.rank, f.s);
      if (f.left == nullptr) {
        finish<T>(f, tile.sums, tile.lds, pixels, 0, f.outputs, residual);
        continue;
      }
      const auto* left = static_cast<const typename Op::Unit*>(f.left);
      for (int64_t column = 0; column < f.outputs; column += kGroupColumns) {
        const int64_t width = f.outputs - column < kGroupColumns ? f.outputs - column : kGroupColumns;
        for (int64_t c = 0; c < width; c += kPanel)
          multiply_full<Op>(
              pixels.count, tile.left, tile.ldl, left, units<Op>(f.rank), column + c, tile.product + c, tile.ldp);
        finish<T>(f, tile.product, tile.ldp, pixels, column, width, residual);
      }
    }
  });
  if (f.mask != nullptr && f.outputs % 8 != 0)
    pack_mask_of<T>({f.geometry.out_pixels() * f.outputs, f.type, f.y, f.mask, nullptr}, threads);
}
