// Derivative of the 3x3 convolution of tiles in its filters, by minimal filtering.
//
// The windows of x and the spread squares of the gradient are transformed, multiplied as outer products over squares, position by
// position, and the sums transformed back to 3x3. Small sums: a task is a fixed share of the squares and keeps sums of its own,
// which are added in order. Large ones: all threads transform a block of squares, then share out its products.
#include "conv_block.h"
#include "conv_outer.h"
#include "winograd.h"

namespace mwm {
namespace MWM_ISA {
namespace {

constexpr int64_t kShareBytes = 640 << 10, kSharedBytes = 24 << 20, kLeastDepth = 48, kMostDepth = 1024;

// One side of the product, in panels of channels: [panel][squares of the block][width].
struct Side {
  int64_t channels, panel, block;

  int64_t width() const { return round_up(channels, kLanes<float>); }
  int64_t panels() const { return (channels + panel - 1) / panel; }
  int64_t panel_width(int64_t i) const { return least(panel, width() - i * panel); }
  int64_t step() const { return width() * block + kLanes<float>; }  // from position to position, off a multiple of the page
  float* at(float* data, int64_t position, int64_t i) const { return data + position * step() + i * panel * block; }
  float* vector(float* data, int64_t position, int64_t square, int64_t c) const {
    return at(data, position, c / panel) + square * panel_width(c / panel) + c % panel;
  }
};

template <class E, int M>
struct SquareOuterProduct {
  static constexpr int A = M + 2, P = A * A, L = kLanes<float>;
  const View &grad, &x;
  const Squares& squares;
  bool vectors_on_x;
  Side vectors, others;

  // Sums lie as [position][panel of vectors][other][width].
  int64_t sum_count() const { return P * vectors.width() * others.width(); }
  int64_t sum_at(int64_t position, int64_t panel) const { return (position * vectors.width() + panel * vectors.panel) * others.width(); }

  // Square `square` into column `s` of a block.
  void read(int64_t square, int64_t s, const E* zeros, float* data, float* spread) const {
    const Side &data_side = vectors_on_x ? vectors : others, &spread_side = vectors_on_x ? others : vectors;
    const E* from[A][A];
    squares.window<M>(square, pointer<E>(x), data_side.channels, zeros, from);
    for (int64_t c = 0; c < data_side.width(); c += L) {
      const Lanes<float> lanes(data_side.channels - c);
      float* to = data_side.vector(data, 0, s, c);
      const int64_t step = data_side.step();
      with_full(lanes, [&](auto full) {
        Both<M>::data([&](int i, int j) { return load_some<decltype(full)::value>(from[i][j] + c, lanes); },
                      [&](int i, int j, FloatVector d) { store(to + (i * A + j) * step, d); });
      });
    }
    int64_t tall, wide;
    const E* corner = squares.corner(square, pointer<E>(grad), spread_side.channels, &tall, &wide);
    for (int64_t c = 0; c < spread_side.width(); c += L) {
      const Lanes<float> lanes(spread_side.channels - c);
      float* to = spread_side.vector(spread, 0, s, c);
      const int64_t step = spread_side.step();
      with_full(lanes, [&](auto full) {
        Both<M>::spread([&](int i, int j) {
          return i < tall && j < wide ? load_some<decltype(full)::value>(corner + (i * squares.width + j) * spread_side.channels + c, lanes) : FloatVector{};
        }, [&](int i, int j, FloatVector m) { store(to + (i * A + j) * step, m); });
      });
    }
  }

  // Adds one position's and panel's products over `count` squares of a block.
  void multiply(int64_t position, int64_t panel, int64_t count, float* vector_data, float* other_data, float* sums) const {
    with_vectors(static_cast<int>(vectors.panel_width(panel) / L), [&](auto number) {
      constexpr int NV = decltype(number)::value;
      constexpr int64_t MR = block_rows(NV);
      float* sum = sums + this->sum_at(position, panel);
      for (int64_t c = 0; c < this->others.channels; c += this->others.panel) {
        const float* other = this->others.at(other_data, position, c / this->others.panel);
        const int64_t rows = least(this->others.panel, this->others.channels - c);
        for (int64_t r = 0; r < rows; r += MR)
          outer_rows<static_cast<int>(MR), NV>(least(MR, rows - r), count, other + r, this->others.panel, this->vectors.at(vector_data, position, panel), sum + (c + r) * NV * L);
      }
    });
  }

  // A share of the squares by one thread.
  void share(int64_t first, int64_t last, float* sums) const {
    Scratch<float> vector_data(P * vectors.step()), other_data(P * others.step());
    Scratch<E> zeros(x.shape[1]);
    std::memset(zeros.data(), 0, static_cast<size_t>(x.shape[1]) * sizeof(E));
    std::memset(sums, 0, static_cast<size_t>(sum_count()) * sizeof(float));
    float *data = vectors_on_x ? vector_data.data() : other_data.data(), *spread = vectors_on_x ? other_data.data() : vector_data.data();
    for (int64_t begin = first; begin < last; begin += vectors.block) {
      const int64_t count = least(vectors.block, last - begin);
      for (int64_t s = 0; s < count; ++s) read(begin + s, s, zeros.data(), data, spread);
      for (int64_t p = 0; p < P; ++p)
        for (int64_t panel = 0; panel < vectors.panels(); ++panel) multiply(p, panel, count, vector_data.data(), other_data.data(), sums);
    }
  }

  // All squares by all threads.
  void together(float* sums, int64_t threads) const {
    Scratch<float> vector_data(P * vectors.step()), other_data(P * others.step());
    Scratch<E> zeros(x.shape[1]);
    std::memset(zeros.data(), 0, static_cast<size_t>(x.shape[1]) * sizeof(E));
    float *data = vectors_on_x ? vector_data.data() : other_data.data(), *spread = vectors_on_x ? other_data.data() : vector_data.data();
    if (squares.count == 0) std::memset(sums, 0, static_cast<size_t>(sum_count()) * sizeof(float));
    for (int64_t first = 0; first < squares.count; first += vectors.block) {
      const int64_t count = least(vectors.block, squares.count - first);
      parallel_for(count, 8, threads, [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) read(first + s, s, zeros.data(), data, spread);
      });
      parallel_for(P * vectors.panels(), 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t p = i / vectors.panels(), panel = i % vectors.panels();
          if (first == 0) std::memset(sums + sum_at(p, panel), 0, static_cast<size_t>(vectors.panel_width(panel) * others.width()) * sizeof(float));
          multiply(p, panel, count, vector_data.data(), other_data.data(), sums);
        }
      });
    }
  }

  // Filters of `other` channels [first, last) from the sums of all shares, in type Out.
  template <class Out>
  void finish(const float* sums, int64_t splits, int64_t first, int64_t last, const View& out) const {
    const int64_t other_step = out.strides[vectors_on_x ? 0 : 1], vector_step = out.strides[vectors_on_x ? 1 : 0];
    for (int64_t other = first; other < last; ++other)
      for (int64_t c = 0; c < vectors.channels; c += L) {
        const int64_t panel = c / vectors.panel, width = vectors.panel_width(panel);
        const int64_t lanes = least<int64_t>(L, vectors.channels - c);
        Both<M>::unfilter([&](int i, int j) {
          const float* from = sums + sum_at(i * A + j, panel) + other * width + c % vectors.panel;
          FloatVector total = load(from);
          for (int64_t split = 1; split < splits; ++split) total += load(from + split * sum_count());
          return total;
        }, [&](int i, int j, FloatVector g) {
          Out* to = pointer<Out>(out) + other * other_step + c * vector_step + i * out.strides[2] + j * out.strides[3];
          if (vector_step == 1) return store_lanes(to, g, Lanes<float>(lanes));
          float values[L];
          store(values, g);
          for (int64_t lane = 0; lane < lanes; ++lane) put(to[lane * vector_step], values[lane]);
        });
      }
  }
};

template <class E, int M>
void weight_gradient(const View& grad, const View& x, const Squares& squares, const View& sums, const View& out, int64_t threads) {
  constexpr int64_t P = (M + 2) * (M + 2), L = kLanes<float>;
  const int64_t inputs = x.shape[1], filters = grad.shape[1], splits = sums.shape[0];
  // Along the side that fills its vectors better.
  const bool vectors_on_x = round_up(inputs, L) * filters < round_up(filters, L) * inputs || (round_up(inputs, L) * filters == round_up(filters, L) * inputs && inputs > filters);
  const int64_t bytes = P * (round_up(inputs, L) + round_up(filters, L)) * static_cast<int64_t>(sizeof(float));
  const int64_t fitting = splits > 1 ? kShareBytes / bytes : kSharedBytes / bytes;
  const int64_t block = least(most(kLeastDepth, least(kMostDepth, fitting)), most<int64_t>(1, squares.count));
  const Side vectors{vectors_on_x ? inputs : filters, kPanel<float>, block}, others{vectors_on_x ? filters : inputs, L, block};
  const SquareOuterProduct<E, M> product{grad, x, squares, vectors_on_x, vectors, others};
  if (sums.shape[1] < product.sum_count()) fail("winograd_grad_weight: sums must have %lld elements a split", static_cast<long long>(product.sum_count()));
  float* partial = pointer<float>(sums);
  if (splits > 1) {
    parallel_for(splits, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) product.share(squares.count * i / splits, squares.count * (i + 1) / splits, partial + i * product.sum_count());
    });
  } else {
    product.together(partial, threads);
  }
  parallel_for(others.channels, 8, threads, [&](int64_t begin, int64_t end) {
    if (out.dtype == DType::kFloat32) product.template finish<float>(partial, splits, begin, end, out);
    else product.template finish<E>(partial, splits, begin, end, out);
  });
}

}  // namespace

void winograd_grad_weight(const View& grad, const View& x, const View& coords, const View& slots, int64_t outputs, const View& sums, const View& out,
                          int64_t threads) {
  const char* op = "winograd_grad_weight";
  check_winograd(op, x, grad, coords, slots, outputs);
  check(op, out, 4, out.dtype == DType::kFloat32 ? DType::kFloat32 : x.dtype);
  if (out.shape[0] != grad.shape[1] || out.shape[1] != x.shape[1] || out.shape[2] != 3 || out.shape[3] != 3) fail("%s: out must be [K, C, 3, 3]", op);
  check(op, sums, 2, DType::kFloat32);
  check_contiguous(op, sums);
  if (sums.shape[0] < 1) fail("%s: sums must be [splits, elements]", op);
  if (element_count(op, out) == 0) return;
  const Squares squares(coords, slots, grad, outputs);
  with_float(op, x.dtype, [&](auto element) {
    using E = decltype(element);
    if constexpr (sizeof(E) < 8) {
      if (outputs == 2) weight_gradient<E, 2>(grad, x, squares, sums, out, threads);
      else weight_gradient<E, 4>(grad, x, squares, sums, out, threads);
    }
  });
}

}  // namespace MWM_ISA
}  // namespace mwm
