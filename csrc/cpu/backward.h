// Backward, tile by tile: mask, g, ds and s ⊙ g in one pass over dy and z, and dx with it for 1x1 layers. Included inside the
// namespace of the instruction set.

// Channels [first, first + count) of d = dy ⊙ mask as a left operand, and into d where it is asked for.
template <class T, class Unit>
void gather_masked(
    const Backward& b, const T* const* rows, const Pixels& pixels, int64_t first, int64_t count, Unit* a, int64_t lda) {
  for (int64_t i = 0; i < pixels.count; ++i, a += lda) {
    const int64_t from = pixels.number[i] * b.outputs + first;
    for (int64_t c = 0; c < count; c += kWidth) {
      const Vec v = keep_bits(read(rows[i] + first + c, count - c), read_bits(b.mask, from + c, count - c));
      if (b.d != nullptr) write(static_cast<T*>(b.d) + from + c, v, count - c);
      put_left(a, c, v, count);
    }
  }
}

// sums = g at a tile's pixels; d beside it.
template <class Op, class T>
void make_g(const Backward& b, const Pixels& pixels, const Buffers<Op>& tile) {
  const T* row[kTilePixels];
  rows_at<const T>(b.dy, pixels, kEvery, row);
  const int64_t all = units<Op>(b.outputs);
  const auto* left = static_cast<const typename Op::Unit*>(b.left);
  for (int64_t k = 0; k < all; k += kBlock) {
    const int64_t count = all - k < kBlock ? all - k : kBlock, channel = k * Op::kElements;
    const int64_t channels = b.outputs - channel < kBlock * Op::kElements ? b.outputs - channel : kBlock * Op::kElements;
    if (b.mask != nullptr)
      gather_masked<T>(b, row, pixels, channel, channels, tile.block, tile.lda);
    else
      gather(row, pixels.count, channel, channels, tile.block, tile.lda);
    if (b.left != nullptr)
      multiply_block<Op>(pixels.count, tile.block, tile.lda, left, k, count, all, b.rank, tile.sums, tile.lds, k > 0);
  }
}

// dx from g: s ⊙ g itself, or its product with the right factors.
template <class Op, class T>
void make_dx(const Backward& b, const Pixels& pixels, const Buffers<Op>& tile) {
  T* row[kTilePixels];
  rows_at<T>(b.dx, pixels, b.right == nullptr ? kEvery : b.geometry.stride, row);
  if (b.right == nullptr) {
    for (int64_t i = 0; i < pixels.count; ++i)
      for (int64_t c = 0; c < b.rank; c += kWidth)
        write(row[i] + c, mul(load(tile.sums + i * tile.lds + c), read(b.s + c, b.rank - c)), b.rank - c);
    return;
  }
  tile.template weigh<float>(pixels.count, b.rank, b.s);
  const auto* right = static_cast<const typename Op::Unit*>(b.right);
  for (int64_t column = 0; column < b.inputs; column += kGroupColumns) {
    const int64_t width = b.inputs - column < kGroupColumns ? b.inputs - column : kGroupColumns;
    for (int64_t c = 0; c < width; c += kPanel)
      multiply_full<Op>(pixels.count, tile.left, tile.ldl, right, units<Op>(b.rank), column + c, tile.product + c, tile.ldp);
    write_rows(tile.product, tile.ldp, pixels.count, column, width, row);
  }
}

template <class Op, class T, class Z>
void backward_of(const Backward& b, const Threads& threads) {
  const Geometry& g = b.geometry;
  const Tiling tiling = backward_tiles(g.out_pixels());
  in_parallel(threads, tiling.tiles, [&](int64_t begin, int64_t end) {
    const Buffers<Op> tile(tiling.most, b.rank);
    Pixels pixels;
    for (int64_t t = begin; t < end; ++t) {
      pixels.fill(tiling.begin(t), tiling.size(t), g.out[0], g.out[1]);
      make_g<Op, T>(b, pixels, tile);
      if (b.partial != nullptr) add_products<Z>(b, tile.sums, tile.lds, pixels, b.partial + t * b.rank);
      if (b.dx.data != nullptr) make_dx<Op, T>(b, pixels, tile);
    }
  });
}

// dx at the pixels of one phase of the stride after another: all pixels of a tile are reached by the same taps.
template <class Op, class T>
void data_gradient_of(const DataGradient& d, const Threads& threads) {
  const Geometry& g = d.geometry;
  const auto extent = [&](int64_t axis, int64_t phase) {
    return phase < g.in[axis] ? (g.in[axis] - phase + g.stride[axis] - 1) / g.stride[axis] : 0;
  };
  const auto tiling_of = [&](int64_t y, int64_t x) {
    return deal_out(g.batch * extent(0, y) * extent(1, x), kForwardPixels, threads.count);
  };
  int64_t tiles = 0;
  for (int64_t y = 0; y < g.stride[0]; ++y)
    for (int64_t x = 0; x < g.stride[1]; ++x) tiles += tiling_of(y, x).tiles;
  const T* source = static_cast<const T*>(d.g);
  const Picture dx{d.dx, g.in[0] * g.in[1] * d.inputs, g.in[1] * d.inputs, d.inputs};
  in_parallel(threads, tiles, [&](int64_t begin, int64_t end) {
    const Buffers<Op> tile(kForwardPixels, d.inputs);
    Pixels pixels;
    T* row[kTilePixels];
    for (int64_t t = begin; t < end; ++t) {
      int64_t in_phase = t, phase[2] = {0, 0};
      while (in_phase >= tiling_of(phase[0], phase[1]).tiles) {
        in_phase -= tiling_of(phase[0], phase[1]).tiles;
        if (++phase[1] == g.stride[1]) phase[1] = 0, ++phase[0];
      }
      const Tiling tiling = tiling_of(phase[0], phase[1]);
      pixels.fill(tiling.begin(in_phase), tiling.size(in_phase), extent(0, phase[0]), extent(1, phase[1]));
      for (int64_t i = 0; i < pixels.count; ++i) {
        pixels.y[i] = static_cast<int32_t>(phase[0] + pixels.y[i] * g.stride[0]);
        pixels.x[i] = static_cast<int32_t>(phase[1] + pixels.x[i] * g.stride[1]);
      }
      convolve_tile<Op, T>(g, pixels.count, d.rank, d.inputs, d.right, tile, [&](int64_t ky, int64_t kx, int64_t i) -> const T* {
        const int64_t y = pixels.y[i] + g.padding[0] - ky * g.dilation[0];
        const int64_t x = pixels.x[i] + g.padding[1] - kx * g.dilation[1];
        if (y < 0 || x < 0 || y % g.stride[0] != 0 || x % g.stride[1] != 0) return nullptr;
        const int64_t out_y = y / g.stride[0], out_x = x / g.stride[1];
        if (out_y >= g.out[0] || out_x >= g.out[1]) return nullptr;
        return source + ((pixels.n[i] * g.out[0] + out_y) * g.out[1] + out_x) * d.rank;
      });
      rows_at<T>(dx, pixels, kEvery, row);
      write_rows(tile.sums, tile.lds, pixels.count, 0, d.inputs, row);
    }
  });
}
