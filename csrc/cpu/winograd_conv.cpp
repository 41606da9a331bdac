// 3x3 convolution of tiles, and its derivative in the input, by minimal filtering.
//
// A task is a block of squares. Their windows are transformed into one matrix [squares, inputs] per position, each is multiplied with
// that position's filters, and what comes out is transformed back, panel by panel of outputs, while everything lies in the cache.
// Always in float32: for the half types too, whose error the transforms would multiply. A square's value depends on nothing but
// its window, so that neither blocks nor threads change it.
#include "conv_block.h"
#include "winograd.h"

namespace mwm {
namespace MWM_ISA {
namespace {

constexpr int64_t kDepth = 128, kBlockBytes = 640 << 10, kLeastSquares = 48, kMostSquares = 192;

// weight [K, C, 3, 3] as the product needs it: from inputs to outputs of this direction.
struct Taps {
  const View& weight;
  bool adjoint;

  int64_t inputs() const { return weight.shape[adjoint ? 0 : 1]; }
  int64_t outputs() const { return weight.shape[adjoint ? 1 : 0]; }
  int64_t input_step() const { return weight.strides[adjoint ? 0 : 1]; }
  int64_t output_step() const { return weight.strides[adjoint ? 1 : 0]; }
  int64_t tap(int i, int j) const { return (adjoint ? 2 - i : i) * weight.strides[2] + (adjoint ? 2 - j : j) * weight.strides[3]; }
  int64_t width() const { return round_up(outputs(), kLanes<float>); }
  int64_t panels() const { return (outputs() + kPanel<float> - 1) / kPanel<float>; }
  int64_t panel_width(int64_t panel) const { return least<int64_t>(kPanel<float>, width() - panel * kPanel<float>); }
  // Filters of one position and panel, [inputs][panel_width].
  int64_t offset(int64_t position, int64_t panel) const { return (position * width() + panel * kPanel<float>) * inputs(); }
};

// `lanes` numbers a step apart, the others zero.
template <class E>
inline FloatVector load_step(const E* from, int64_t step, int64_t lanes) {
  if (step == 1) return load_lanes(from, Lanes<float>(lanes));
  float values[kLanes<float>] = {};
  for (int64_t i = 0; i < least<int64_t>(lanes, kLanes<float>); ++i) values[i] = widen(from[i * step]);
  return load(values);
}

// W: type of the weight, E: type it is rounded to.
template <class W, class E, int M>
struct Filtering {
  static constexpr int A = M + 2, L = kLanes<float>;
  const Taps& taps;
  float* to;

  // Vectors run along the side that is contiguous in memory: the outputs, or the inputs, which are then transposed in the cache.
  void panel(int64_t panel, int64_t first, int64_t last) const {
    const int64_t width = taps.panel_width(panel);
    if (taps.output_step() == 1) {
      for (int64_t c = first; c < last; ++c)
        for (int64_t k = 0; k < width; k += L)
          one(panel * kPanel<float> + k, c, taps.output_step(), taps.outputs() - panel * kPanel<float> - k,
              [&](int i, int j, FloatVector u) { store(to + taps.offset(i * A + j, panel) + c * width + k, u); });
      return;
    }
    Scratch<float> rows(A * A * width * L);
    for (int64_t c = first; c < last; c += L) {
      const int64_t lanes = least<int64_t>(L, last - c), outputs = least(width, taps.outputs() - panel * kPanel<float>);
      for (int64_t k = 0; k < width; ++k) {
        one(panel * kPanel<float> + k, c, taps.input_step(), k < outputs ? lanes : 0,
            [&](int i, int j, FloatVector u) { store(rows.data() + ((i * A + j) * width + k) * L, u); });
      }
      for (int p = 0; p < A * A; ++p) {
        float* out = to + taps.offset(p, panel) + c * width;
        const float* from = rows.data() + p * width * L;
        for (int64_t lane = 0; lane < lanes - lanes % 4; lane += 4)
          for (int64_t k = 0; k < width; k += 4) {
            const float* square = from + k * L + lane;
            transpose(square, square + L, square + 2 * L, square + 3 * L, out + lane * width + k, width);
          }
        for (int64_t lane = lanes - lanes % 4; lane < lanes; ++lane)
          for (int64_t k = 0; k < width; ++k) out[lane * width + k] = from[k * L + lane];
      }
    }
  }

  template <class Write>
  void one(int64_t output, int64_t input, int64_t step, int64_t lanes, const Write& write) const {
    const W* from = pointer<W>(taps.weight) + output * taps.output_step() + input * taps.input_step();
    Both<M>::filter([&](int i, int j) {
      const FloatVector tap = lanes > 0 ? load_step(from + taps.tap(i, j), step, lanes) : FloatVector{};
      if constexpr (__is_same(W, E)) return tap;
      else return rounded<E>(tap);
    }, write);
  }
};

template <class E, int M>
struct SquareProduct {
  static constexpr int A = M + 2, P = A * A, L = kLanes<float>;
  const View &x, &bias, &out;
  const Squares& squares;
  const Taps& taps;
  const float* filters;
  int64_t block;  // squares of a task

  int64_t row() const { return round_up(taps.inputs(), L); }
  int64_t data_step() const { return block * row() + L; }  // off a multiple of the page, where the cache's sets would collide

  void run(int64_t begin, int64_t end) const {
    Scratch<float> data(P * data_step()), products(P * (block + kMaxBlockRows) * kPanel<float>);
    Scratch<E> zeros(taps.inputs());
    std::memset(zeros.data(), 0, static_cast<size_t>(taps.inputs()) * sizeof(E));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * block, count = least(block, squares.count - first);
      for (int64_t s = 0; s < count; ++s) read(first + s, zeros.data(), data.data() + s * row());
      for (int64_t panel = 0; panel < taps.panels(); ++panel)
        with_vectors(static_cast<int>(taps.panel_width(panel) / L), [&](auto vectors) {
          constexpr int NV = decltype(vectors)::value;
          this->template multiply<NV>(panel, count, data.data(), products.data());
          this->template write<NV>(panel, first, count, products.data());
        });
    }
  }

  void read(int64_t square, const E* zeros, float* to) const {
    const E* from[A][A];
    squares.window<M>(square, pointer<E>(x), taps.inputs(), zeros, from);
    for (int64_t c = 0; c < taps.inputs(); c += L) {
      const Lanes<float> lanes(taps.inputs() - c);
      with_full(lanes, [&](auto full) {
        const int64_t step = this->data_step();
        Both<M>::data([&](int i, int j) { return load_some<decltype(full)::value>(from[i][j] + c, lanes); },
                      [&](int i, int j, FloatVector d) { store(to + (i * A + j) * step + c, d); });
      });
    }
  }

  template <int NV>
  void multiply(int64_t panel, int64_t count, const float* data, float* products) const {
    constexpr int MR = block_rows(NV), width = NV * L;
    const int64_t step = (block + kMaxBlockRows) * width;
    for (int64_t p = 0; p < P; ++p) {
      const float* filter = filters + taps.offset(p, panel);
      for (int64_t c = 0; c < taps.inputs(); c += kDepth) {
        const int64_t depth = least(kDepth, taps.inputs() - c);
        for (int64_t s = 0; s < count; s += MR) {
          const float* rows[MR];
          float* sums[MR];
          // The last block is filled up with a square whose products nobody reads again.
          for (int r = 0; r < MR; ++r) rows[r] = data + p * data_step() + least(s + r, count - 1) * row() + c, sums[r] = products + p * step + (s + r) * width;
          if (c == 0) multiply_block<MR, NV, true>(depth, rows, filter, sums);
          else multiply_block<MR, NV>(depth, rows, filter + c * width, sums);
        }
      }
    }
  }

  template <int NV>
  void write(int64_t panel, int64_t first, int64_t count, const float* products) const {
    constexpr int width = NV * L;
    const int64_t step = (block + kMaxBlockRows) * width, channels = taps.outputs(), channel = panel * kPanel<float>;
    for (int64_t s = 0; s < count; ++s) {
      int64_t tall, wide;
      E* to = squares.corner(first + s, pointer<E>(out), channels, &tall, &wide) + channel;
      for (int64_t k = 0; k < width; k += L) {
        const Lanes<float> lanes(channels - channel - k);
        const FloatVector added = is_none(bias) ? FloatVector{} : load_lanes(pointer<E>(bias) + channel + k, lanes);
        with_full(lanes, [&](auto full) {
          Both<M>::outputs([&](int i, int j) { return load(products + (i * A + j) * step + s * width + k); },
                           [&](int i, int j, FloatVector y) {
                             if (i < tall && j < wide) store_some<decltype(full)::value>(to + (i * squares.width + j) * channels + k, y + added, lanes);
                           });
        });
      }
    }
  }
};

template <class W, class E, int M>
void convolve(const View& x, const View& bias, const Squares& squares, const Taps& taps, const View& workspace, const View& out, int64_t threads) {
  float* filters = pointer<float>(workspace);
  const Filtering<W, E, M> filtering{taps, filters};
  constexpr int64_t kInputs = 64;
  const int64_t parts = (taps.inputs() + kInputs - 1) / kInputs;
  parallel_for(taps.panels() * parts, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % parts * kInputs;
      filtering.panel(i / parts, first, least(first + kInputs, taps.inputs()));
    }
  });
  // Blocks that fit the cache, as many for each thread.
  const int64_t bytes = (M + 2) * (M + 2) * (taps.inputs() + kPanel<float>) * static_cast<int64_t>(sizeof(float));
  const int64_t largest = most(kLeastSquares, least(kMostSquares, kBlockBytes / bytes));
  const int64_t tasks = round_up((squares.count + largest - 1) / largest, threads);
  const int64_t block = (squares.count + tasks - 1) / tasks;
  const SquareProduct<E, M> product{x, bias, out, squares, taps, filters, block};
  parallel_for((squares.count + block - 1) / block, 1, threads, [&](int64_t begin, int64_t end) { product.run(begin, end); });
}

}  // namespace

void winograd_conv(const View& x, const View& weight, const View& bias, const View& coords, const View& slots, int64_t outputs, int64_t adjoint,
                   const View& workspace, const View& out, int64_t threads) {
  const char* op = "winograd_conv";
  check_winograd(op, x, out, coords, slots, outputs);
  // A weight in float32 is rounded to the half type of x.
  const bool rounds = weight.dtype == DType::kFloat32 && x.dtype != DType::kFloat32;
  check(op, weight, 4, rounds ? DType::kFloat32 : x.dtype);
  const Taps taps{weight, adjoint != 0};
  if (weight.shape[2] != 3 || weight.shape[3] != 3) fail("%s: weight must be [K, C, 3, 3]", op);
  if (taps.inputs() != x.shape[1] || taps.outputs() != out.shape[1]) fail("%s: weight does not fit the channels", op);
  if (!is_none(bias)) {
    check(op, bias, 1, x.dtype);
    check_contiguous(op, bias);
    if (bias.shape[0] != out.shape[1]) fail("%s: bias does not fit the channels", op);
  }
  check(op, workspace, 1, DType::kFloat32);
  check_contiguous(op, workspace);
  const int64_t needed = (outputs + 2) * (outputs + 2) * taps.width() * taps.inputs();
  if (workspace.shape[0] < needed) fail("%s: workspace must have %lld elements", op, static_cast<long long>(needed));
  if (element_count(op, out) == 0 || taps.inputs() == 0) return;
  const Squares squares(coords, slots, out, outputs);
  with_float(op, x.dtype, [&](auto element) {
    using E = decltype(element);
    if constexpr (sizeof(E) < 8) {
      if (rounds && outputs == 2) convolve<float, E, 2>(x, bias, squares, taps, workspace, out, threads);
      else if (rounds) convolve<float, E, 4>(x, bias, squares, taps, workspace, out, threads);
      else if (outputs == 2) convolve<E, E, 2>(x, bias, squares, taps, workspace, out, threads);
      else convolve<E, E, 4>(x, bias, squares, taps, workspace, out, threads);
    }
  });
}

}  // namespace MWM_ISA
}  // namespace mwm
