// Packed depthwise 7x7 convolution over visible tiles on a CPU: forward (and input gradient), weight and bias gradient.
// Built by native.py with REAL = float or double, called by depthwise_cpu.py; a plain C interface, no header of torch.
//
// B images, V visible tiles, T tile side, C channels. tiles (B, V, T, T, C), weight (49, C), visible (B, V) int64 patch
// of every tile, slots (B, rows * columns) int32 tile of every patch or -1.
//
// A tile is cut into cells of side S = 8, 4, 2 or 1. The cells that a cell can see are looked up once, for all channels;
// a missing one is skipped, so only products that exist are computed. Over W channels at a time, a row of S outputs, the
// 7 weights of a kernel row and one pixel live in registers: 16 vectors. Accumulation is in the type of the tiles.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "channels.h"

namespace {

constexpr int K = 7, R = K / 2;

struct Shape {
  int64_t batch, count, side, channels, rows, columns;
  const int64_t* visible;
  const int32_t* slots;
};

// Offsets, in numbers, of the cells within reach of one cell from the first tile of its image; -1 where there is none.
template <int S>
struct Neighbours {
  static constexpr int reach = (R + S - 1) / S, width = 2 * reach + 1;
  int64_t offset[width][width];

  Neighbours(const Shape& s, int64_t image, int64_t cell_y, int64_t cell_x) {
    const int64_t parts = s.side / S, row = s.side * s.channels;
    // Patch and place in it along each axis, found once: divisions would take longer than the lookups.
    int64_t patch_y[width], place_y[width], patch_x[width], place_x[width];
    split(cell_y, parts, s.rows, patch_y, place_y);
    split(cell_x, parts, s.columns, patch_x, place_x);
    for (int i = 0; i < width; ++i)
      for (int j = 0; j < width; ++j) {
        offset[i][j] = -1;
        if (patch_y[i] < 0 || patch_x[j] < 0) continue;
        const int32_t slot = s.slots[(image * s.rows + patch_y[i]) * s.columns + patch_x[j]];
        if (slot >= 0) offset[i][j] = (slot * s.side + place_y[i] * S) * row + place_x[j] * S * s.channels;
      }
  }

  // Cells around `cell` along an axis of `patches` patches of `parts` cells: the patch (-1 outside), the place in it.
  static inline void split(int64_t cell, int64_t parts, int64_t patches, int64_t* patch, int64_t* place) {
    for (int i = 0; i < width; ++i) {
      const int64_t at = cell + i - reach, quotient = parts == 1 ? at : at / parts;
      patch[i] = at < 0 || at >= patches * parts ? -1 : quotient;
      place[i] = at - quotient * parts;
    }
  }
};

// The products of every output of a small cell as lists, made once for all channels. In such cells most rows of taps have
// a neighbour missing, and looking at each of them again for all channels would take longer than the products.
template <int S>
struct Lists {
  struct Product {
    int32_t input;  // offset from the first tile of the image
    int32_t tap;    // offset in the weights
  };
  int size[S * S] = {};
  Product products[S * S][K * K];

  Lists(const Shape& s, const Neighbours<S>& near) {
    constexpr int reach = Neighbours<S>::reach;
    const int64_t pixel = s.channels, row = s.side * pixel;
    for (int dy = -reach; dy <= reach; ++dy)
      for (int dx = -reach; dx <= reach; ++dx) {
        const int64_t cell = near.offset[dy + reach][dx + reach];
        if (cell < 0) continue;
        for (int output = 0; output < S * S; ++output)
          for (int input = 0; input < S * S; ++input) {
            const int ky = dy * S + input / S - output / S + R, kx = dx * S + input % S - output % S + R;
            if (ky < 0 || kx < 0 || ky >= K || kx >= K) continue;
            products[output][size[output]++] = {static_cast<int32_t>(cell + input / S * row + input % S * pixel),
                                                static_cast<int32_t>((ky * K + kx) * pixel)};
          }
      }
  }
};

// A cell: its image's first tile and its own first position (offsets), and what is within reach of it.
template <int S>
struct Cell {
  int64_t image, at;
  std::conditional_t<(S <= 2), Lists<S>, Neighbours<S>> near;
};

// Calls visit(cells) for the cells of some tiles, a few tiles at a time: what belongs to one vector of channels of such a
// group, weights above all, stays in the nearest cache if channels are the outer loop.
template <int S, typename Visit>
inline void for_groups(const Shape& s, int64_t begin, int64_t end, Visit visit) {
  constexpr int64_t group = 1 + 32 / (S * S);
  const int64_t parts = s.side / S, row = s.side * s.channels, tile_size = s.side * row;
  std::vector<Cell<S>> cells;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t image = tile / s.count, patch = s.visible[tile];
    for (int64_t py = 0; py < parts; ++py)
      for (int64_t px = 0; px < parts; ++px) {
        const Neighbours<S> near(s, image, patch / s.columns * parts + py, patch % s.columns * parts + px);
        const int64_t at = tile * tile_size + py * S * row + px * S * s.channels;
        if constexpr (S <= 2) cells.push_back({image * s.count * tile_size, at, Lists<S>(s, near)});
        else cells.push_back({image * s.count * tile_size, at, near});
      }
    if ((tile - begin) % group == group - 1 || tile == end - 1) {
      visit(cells);
      cells.clear();
    }
  }
}

// Calls product(px, kx, pixel, weight index) for every product that a row of S outputs has with kernel row ky.
// The loops have constant bounds and unroll completely, so arrays indexed by px and kx stay in registers.
template <int S, typename A, typename T, typename Begin, typename Product>
inline void for_products(const T* tiles, const Neighbours<S>& near, int y, int ky, int64_t row, int64_t pixel, int64_t n,
                         Begin begin, Product product) {
  constexpr int reach = Neighbours<S>::reach;
  const int from = y + ky - R + reach * S;  // source row, counted from the first row of the uppermost neighbour
  const int64_t* offsets = near.offset[from / S];
  bool begun = false;
#pragma GCC unroll 7
  for (int dx = -reach; dx <= reach; ++dx) {
    if (offsets[dx + reach] < 0) continue;
    if (!begun) begin();
    begun = true;
    const T* source = tiles + offsets[dx + reach] + from % S * row;
#pragma GCC unroll 8
    for (int sx = 0; sx < S; ++sx) {
      const int at = dx * S + sx;
      if (at < -R || at >= S + R) continue;
      const auto x = A::load(source + sx * pixel, n);
#pragma GCC unroll 8
      for (int px = 0; px < S; ++px) {
        const int kx = at - px + R;
        if (kx >= 0 && kx < K) product(px, kx, x);
      }
    }
  }
}

template <typename T, int W, bool ALL, int S>
inline void convolve_cell(const Shape& s, const T* tiles, const T* weight, const T* bias, T* out, const Lists<S>& lists,
                          int64_t n) {
  using A = Access<T, W, ALL>;
  const int64_t pixel = s.channels, row = s.side * pixel;
  for (int output = 0; output < S * S; ++output) {
    auto sum = bias ? A::load(bias, n) : typename A::Vector{};
    for (int i = 0; i < lists.size[output]; ++i) {
      const auto& product = lists.products[output][i];
      sum += A::load(tiles + product.input, n) * A::load(weight + product.tap, n);
    }
    A::store(out + output / S * row + output % S * pixel, sum, n);
  }
}

template <typename T, int W, bool ALL, int S>
inline void accumulate_cell(const Shape& s, const T* tiles, const T* grad, T* weight_grad, T* bias_grad,
                            const Lists<S>& lists, int64_t n) {
  using A = Access<T, W, ALL>;
  const int64_t pixel = s.channels, row = s.side * pixel;
  auto total = A::load(bias_grad, n);
  for (int output = 0; output < S * S; ++output) {
    const auto g = A::load(grad + output / S * row + output % S * pixel, n);
    total += g;
    for (int i = 0; i < lists.size[output]; ++i) {
      const auto& product = lists.products[output][i];
      T* sum = weight_grad + product.tap;
      A::store(sum, A::load(sum, n) + A::load(tiles + product.input, n) * g, n);
    }
  }
  A::store(bias_grad, total, n);
}

template <typename T, int W, bool ALL, int S>
inline void convolve_cell(const Shape& s, const T* tiles, const T* weight, const T* bias, T* out,
                          const Neighbours<S>& near, int64_t n) {
  using A = Access<T, W, ALL>;
  using Vector = typename A::Vector;
  const int64_t pixel = s.channels, row = s.side * pixel;
  const Vector initial = bias ? A::load(bias, n) : Vector{};
  for (int y = 0; y < S; ++y) {
    Vector sum[S];
    for (int px = 0; px < S; ++px) sum[px] = initial;
    for (int ky = 0; ky < K; ++ky) {
      Vector w[K];
      for_products<S, A>(
          tiles, near, y, ky, row, pixel, n,
          [&] {
#pragma GCC unroll 7
            for (int kx = 0; kx < K; ++kx) w[kx] = A::load(weight + (ky * K + kx) * pixel, n);
          },
          [&](int px, int kx, const Vector& x) { sum[px] += x * w[kx]; });
    }
    for (int px = 0; px < S; ++px) A::store(out + y * row + px * pixel, sum[px], n);
  }
}

template <typename T, int W, bool ALL, int S>
inline void accumulate_cell(const Shape& s, const T* tiles, const T* grad, T* weight_grad, T* bias_grad,
                            const Neighbours<S>& near, int64_t n) {
  using A = Access<T, W, ALL>;
  using Vector = typename A::Vector;
  const int64_t pixel = s.channels, row = s.side * pixel;
  Vector total = A::load(bias_grad, n);
  for (int y = 0; y < S; ++y) {
    Vector g[S];
    for (int px = 0; px < S; ++px) {
      g[px] = A::load(grad + y * row + px * pixel, n);
      total += g[px];
    }
    for (int ky = 0; ky < K; ++ky) {
      Vector sum[K];
      bool begun = false;
      for_products<S, A>(
          tiles, near, y, ky, row, pixel, n,
          [&] {
            begun = true;
#pragma GCC unroll 7
            for (int kx = 0; kx < K; ++kx) sum[kx] = A::load(weight_grad + (ky * K + kx) * pixel, n);
          },
          [&](int px, int kx, const Vector& x) { sum[kx] += x * g[px]; });
      if (!begun) continue;
#pragma GCC unroll 7
      for (int kx = 0; kx < K; ++kx) A::store(weight_grad + (ky * K + kx) * pixel, sum[kx], n);
    }
  }
  A::store(bias_grad, total, n);
}

template <typename T, int S>
void convolve(const Shape& s, const T* tiles, const T* weight, const T* bias, T* out, int threads) {
  const int64_t total = s.batch * s.count;
  // A few runs of tiles per thread: what a tile costs depends on its neighbours.
  const int64_t runs = std::min<int64_t>(total, threads * 8);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t run = 0; run < runs; ++run)
    for_groups<S>(s, total * run / runs, total * (run + 1) / runs, [&](const auto& cells) {
      for_channels<T>(0, s.channels, [&]<int W, bool ALL>(int64_t c, int64_t n) {
        for (const auto& cell : cells)
          convolve_cell<T, W, ALL, S>(s, tiles + cell.image + c, weight + c, bias ? bias + c : nullptr,
                                      out + cell.at + c, cell.near, n);
      });
    });
}

// One sum per run of tiles, (runs, 50, C): 49 rows of weight gradient, one of bias gradient; all zero at the start.
template <typename T, int S>
void accumulate(const Shape& s, const T* tiles, const T* grad, T* sums, int64_t runs, int threads) {
  const int64_t total = s.batch * s.count;
  // Channels are shared out as well where there are few runs, in whole vectors.
  const int64_t parts = std::min<int64_t>((2 * threads + runs - 1) / runs, (s.channels + 63) / 64);
  const int64_t width = ((s.channels + parts - 1) / parts + 15) / 16 * 16;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t item = 0; item < runs * parts; ++item) {
    const int64_t run = item / parts, begin = std::min(item % parts * width, s.channels);
    const int64_t end = std::min(begin + width, s.channels);
    T* sum = sums + run * (K * K + 1) * s.channels;
    for_groups<S>(s, total * run / runs, total * (run + 1) / runs, [&](const auto& cells) {
      for_channels<T>(begin, end, [&]<int W, bool ALL>(int64_t c, int64_t n) {
        for (const auto& cell : cells)
          accumulate_cell<T, W, ALL, S>(s, tiles + cell.image + c, grad + cell.at + c, sum + c,
                                        sum + K * K * s.channels + c, cell.near, n);
      });
    });
  }
}

// Calls run<S>() for the cell side S: the largest of 8, 4, 2, 1 that divides the tile side.
template <typename Run>
inline void with_cell(int64_t side, Run run) {
  if (side % 8 == 0) run.template operator()<8>();
  else if (side % 4 == 0) run.template operator()<4>();
  else if (side % 2 == 0) run.template operator()<2>();
  else run.template operator()<1>();
}

// Calls run(c, k, k·C + c) for every channel and tap, in blocks that stay in the cache either way round.
template <typename Run>
inline void for_taps(int64_t channels, Run run) {
  for (int64_t begin = 0; begin < channels; begin += 16)
    for (int k = 0; k < K * K; ++k)
      for (int64_t c = begin; c < std::min(begin + 16, channels); ++c) run(c, k, k * channels + c);
}

}  // namespace

// Sizes are B, V, T, C, rows, columns; weight and its gradient (C, 49). Pointers are to contiguous memory.

// The bias may be null. With `turned` the kernel is turned round, which gives the input gradient.
extern "C" void fcmae_convolve(const int64_t* sizes, const int64_t* visible, const int32_t* slots, const REAL* tiles,
                               const REAL* weight, const REAL* bias, int64_t turned, REAL* out, int64_t threads) {
  const Shape s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], visible, slots};
  Zeros<REAL> memory(K * K * s.channels);
  REAL* taps = memory.data();
  for_taps(s.channels, [&](int64_t c, int k, int64_t at) { taps[at] = weight[c * K * K + (turned ? K * K - 1 - k : k)]; });
  with_cell(s.side, [&]<int S>() { convolve<REAL, S>(s, tiles, taps, bias, out, static_cast<int>(threads)); });
}

// The sums over tiles are taken in `runs` parts, so that their order does not depend on the number of threads.
extern "C" void fcmae_accumulate(const int64_t* sizes, const int64_t* visible, const int32_t* slots, const REAL* tiles,
                                 const REAL* grad, REAL* grad_weight, REAL* grad_bias, int64_t runs, int64_t threads) {
  const Shape s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], visible, slots};
  const int64_t size = (K * K + 1) * s.channels;
  Zeros<REAL> memory(runs * size);
  REAL* sums = memory.data();
  with_cell(s.side, [&]<int S>() { accumulate<REAL, S>(s, tiles, grad, sums, runs, static_cast<int>(threads)); });
  for (int64_t run = 1; run < runs; ++run)
    for (int64_t at = 0; at < size; ++at) sums[at] += sums[run * size + at];
  for_taps(s.channels, [&](int64_t c, int k, int64_t at) { grad_weight[c * K * K + k] = sums[at]; });
  std::copy_n(sums + K * K * s.channels, s.channels, grad_bias);
}
