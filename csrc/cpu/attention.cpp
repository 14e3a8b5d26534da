// Softmax attention on the CPU, a head of a sample at a time. Its keys and values are packed once, for products whose
// tiles stay in registers; queries go by in blocks whose scores stay in a cache. What is stored as S is computed as T:
// bfloat16 is widened where it is packed, and rounded once, in the result.
#include <cmath>
#include <memory>

#include "../common.h"
#include "bfloat16.h"
#include "isa.h"
#include "pack.h"
#include "threads.h"

MATPAC_DECLARE(void attention_forward(const AttentionArgs& args, int64_t begin, int64_t end, void* scratch))
MATPAC_DECLARE(void attention_backward(const AttentionArgs& args, int64_t begin, int64_t end, void* scratch))
MATPAC_DECLARE(int64_t attention_scratch(const AttentionArgs& args, bool backward))

namespace matpac {
namespace {
constexpr int64_t kBlock = 48;  // queries whose scores exist at a time
}
}  // namespace matpac

namespace matpac::MATPAC_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 12;  // of a tile; two vectors wide, it takes three quarters of the registers
#else
constexpr int kRows = 6;
#endif
template <typename T>
constexpr int kColumns = 2 * kLanes<T>;  // of a tile

constexpr int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// c (kRows, kColumns), `c_row` apart, = or += a b over `depth`. a[r * a_row + k * a_step] is one factor; b has
// kColumns next to each other for each k.
template <typename T, bool kAdd>
MATPAC_INLINE void tile(const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t depth, T* c, int64_t c_row) {
  constexpr int lanes = kLanes<T>;
  Vector<T> sum[kRows][2];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = kAdd ? load(c + r * c_row) : Vector<T>{};
    sum[r][1] = kAdd ? load(c + r * c_row + lanes) : Vector<T>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vector<T> low = load(b + k * kColumns<T>), high = load(b + k * kColumns<T> + lanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Vector<T> x = broadcast(a[r * a_row + k * a_step]);
      sum[r][0] = fma(x, low, sum[r][0]);
      sum[r][1] = fma(x, high, sum[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    store(c + r * c_row, sum[r][0]);
    store(c + r * c_row + lanes, sum[r][1]);
  }
}

// A factor that is read where it lies; its rows are read up to the next multiple of kRows.
template <typename T>
struct Left {
  const T* at;
  int64_t row, step;
};
// A factor in panels of kColumns: panel p has column p * kColumns + j of row k at [p][k][j]. Zeros fill the last one.
template <typename T>
struct Panels {
  const T* at;
  int64_t depth, stride;  // rows that count, and rows that a panel has room for
};

// c (rows, columns) = or += a b. Rows and columns are written up to whole tiles.
template <bool kAdd, typename T>
void product(Left<T> a, Panels<T> b, int64_t rows, int64_t columns, T* c, int64_t c_row) {
  for (int64_t j = 0; j < columns; j += kColumns<T>) {
    for (int64_t i = 0; i < rows; i += kRows) {
      tile<T, kAdd>(a.at + i * a.row, a.row, a.step, b.at + j * b.stride, b.depth, c + i * c_row + j, c_row);
    }
  }
}

// Panels of x (rows, width), whose rows are `row` apart.
template <typename S, typename T>
void pack(const S* x, int64_t row, int64_t rows, int64_t width, int64_t stride, T* out) {
  for (int64_t j = 0; j < width; j += kColumns<T>) {
    const int64_t count = width - j < kColumns<T> ? width - j : int64_t(kColumns<T>);
    for (int64_t k = 0; k < rows; ++k) {
      const S* from = x + k * row + j;
      T* to = out + j * stride + k * kColumns<T>;
      if (count == kColumns<T>) {
        store(to, load_wide(from));
        store(to + kLanes<T>, load_wide(from + kLanes<T>));
        continue;
      }
      for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
      for (int64_t i = count; i < kColumns<T>; ++i) to[i] = T(0);
    }
  }
}

// Panels of x's transpose (width, rows).
template <typename S, typename T>
void pack_turned(const S* x, int64_t row, int64_t rows, int64_t width, T* out) {
  for (int64_t first = 0; first < up(rows, kColumns<T>); first += 4) {
    T* to = out + first / kColumns<T> * kColumns<T> * width + first % kColumns<T>;
    const int64_t count = rows - first < 4 ? rows - first : 4;
    for (int64_t k = count == 4 ? turn_four(x + first * row, row, width, to, kColumns<T>) : 0; k < width; ++k) {
      for (int64_t i = 0; i < 4; ++i) to[k * kColumns<T> + i] = i < count ? widen(x[(first + i) * row + k]) : T(0);
    }
  }
}

// x (rows, width), rows next to each other, and zeros up to whole tiles.
template <typename S, typename T>
void copy(const S* x, int64_t row, int64_t rows, int64_t width, T* out) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < width; ++k) out[i * width + k] = widen(x[i * row + k]);
  }
  for (int64_t i = rows * width; i < up(rows, kRows) * width; ++i) out[i] = T(0);
}

constexpr double kLog2e = 1.44269504088896340736;

// Where everything of a head lies in the scratch memory, in elements.
template <typename T>
struct Room {
  int64_t tokens, width;
  int64_t columns = up(up(tokens, kColumns<T>), Pack<T>::lanes);  // of scores
  int64_t wide = up(width, kColumns<T>);
  int64_t all = up(tokens, kRows), block = up(kBlock, kRows);
  // forward and backward
  int64_t keys_turned = 0, queries = keys_turned + columns * width, scores = queries + block * width;
  int64_t out = scores + block * columns + kRows, values = out + block * wide;
  int64_t forward = values + tokens * wide;
  // backward alone; `values` are turned there
  int64_t keys = values + columns * width, grads = keys + tokens * wide, query_panels = grads + block * width;
  int64_t grad_panels = query_panels + block * wide, slopes = grad_panels + block * wide;
  int64_t key_grads = slopes + block * columns + kRows, value_grads = key_grads + all * wide;
  int64_t backward = value_grads + all * wide;

  explicit Room(const AttentionArgs& a) : tokens(a.tokens), width(a.width) {}
};

// One head of one sample.
template <typename S>
struct Head {
  const S *query, *key, *value;  // rows `row` apart
  int64_t row, out_row;
  int64_t out_at, stats_at, qkv_at;

  Head(const AttentionArgs& a, int64_t item) {
    const int64_t sample = item / a.heads, head = item % a.heads, channels = a.heads * a.width;
    row = 3 * channels, out_row = channels;
    qkv_at = sample * a.tokens * row + head * a.width;
    out_at = sample * a.tokens * out_row + head * a.width;
    stats_at = item * a.tokens;
    query = static_cast<const S*>(a.qkv) + qkv_at, key = query + channels, value = key + channels;
  }
};

// The sum of x * y.
template <typename T>
MATPAC_INLINE double dot(const T* x, const T* y, int64_t n) {
  using P = Pack<T>;
  P sum = P::fill(T(0));
  const int64_t whole = n / P::lanes * P::lanes;
  for (int64_t i = 0; i < whole; i += P::lanes) sum = sum + P::load(x + i) * P::load(y + i);
  if (const int rest = int(n - whole)) sum = sum + P::load(x + whole, rest, T(0)) * P::load(y + whole, rest, T(0));
  return sum.sum();
}

// Of the blocks of queries of all heads those from `begin` to `end`.
template <typename S, typename T = Computed<S>>
void forward(const AttentionArgs& args, int64_t begin, int64_t end, T* scratch) {
  using P = Pack<T>;
  const Room<T> at(args);
  const int64_t n = args.tokens, width = args.width;
  const P factor = P::fill(T(kLog2e / std::sqrt(double(width))));
  T *queries = scratch + at.queries, *scores = scratch + at.scores, *weighed = scratch + at.out;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t item = i / blocks, first = i % blocks * kBlock, rows = n - first < kBlock ? n - first : kBlock;
    const Head<S> head(args, item);
    if (i == begin || first == 0) {
      pack_turned(head.key, head.row, n, width, scratch + at.keys_turned);
      pack(head.value, head.row, n, width, n, scratch + at.values);
    }
    copy(head.query + first * head.row, head.row, rows, width, queries);
    product<false>(Left<T>{queries, width, 1}, Panels<T>{scratch + at.keys_turned, width, width}, rows, n, scores,
                   at.columns);
    T total[kBlock];
    for (int64_t q = 0; q < rows; ++q) {
      T* row = scores + q * at.columns;
      for (int64_t j = n; j < at.columns; ++j) row[j] = -INFINITY;
      P most = P::load(row);
      for (int64_t j = P::lanes; j < at.columns; j += P::lanes) most = max(P::load(row + j), most);
      const T largest = most.largest();
      P sum = P::fill(T(0));
      for (int64_t j = 0; j < at.columns; j += P::lanes) {
        const P p = exp2((P::load(row + j) - P::fill(largest)) * factor);
        p.store(row + j);
        sum = sum + p;
      }
      total[q] = T(1 / sum.sum());
      if (T* stats = static_cast<T*>(args.stats)) {
        stats += 2 * (head.stats_at + first + q);
        stats[0] = largest, stats[1] = total[q];
      }
    }
    product<false>(Left<T>{scores, at.columns, 1}, Panels<T>{scratch + at.values, n, n}, rows, width, weighed, at.wide);
    S* out = static_cast<S*>(args.out) + head.out_at + first * head.out_row;
    for (int64_t q = 0; q < rows; ++q) {
      for (int64_t k = 0; k < width; ++k) narrow(total[q] * weighed[q * at.wide + k], out[q * head.out_row + k]);
    }
  }
}

// Of all heads those from `begin` to `end`, each of which sums over its queries.
//
// With p the probabilities, g the gradient of a query's result and o that result: the gradient of a score is
// p (g v - g o), and those of queries, keys and values are products of it, and of p, with keys, queries and g.
template <typename S, typename T = Computed<S>>
void backward(const AttentionArgs& args, int64_t begin, int64_t end, T* scratch) {
  using P = Pack<T>;
  const Room<T> at(args);
  const int64_t n = args.tokens, width = args.width, channels = args.heads * width;
  const double root = std::sqrt(double(width));
  const P factor = P::fill(T(kLog2e / root));
  T *queries = scratch + at.queries, *scores = scratch + at.scores, *slopes = scratch + at.slopes;
  T *grads = scratch + at.grads, *query_grads = scratch + at.out;
  T* const results = query_grads;  // which are read before those are written
  T *key_grads = scratch + at.key_grads, *value_grads = scratch + at.value_grads;
  for (int64_t item = begin; item < end; ++item) {
    const Head<S> head(args, item);
    pack_turned(head.key, head.row, n, width, scratch + at.keys_turned);
    pack_turned(head.value, head.row, n, width, scratch + at.values);
    pack(head.key, head.row, n, width, n, scratch + at.keys);
    for (int64_t i = 0; i < at.all * at.wide; ++i) key_grads[i] = value_grads[i] = T(0);
    S* out = static_cast<S*>(args.out) + head.qkv_at;
    for (int64_t first = 0; first < n; first += kBlock) {
      const int64_t rows = n - first < kBlock ? n - first : kBlock;
      const S* grad = static_cast<const S*>(args.grad) + head.out_at + first * head.out_row;
      const S* result = static_cast<const S*>(args.result) + head.out_at + first * head.out_row;
      copy(head.query + first * head.row, head.row, rows, width, queries);
      copy(grad, head.out_row, rows, width, grads);
      copy(result, head.out_row, rows, width, results);
      pack(queries, width, rows, width, rows, scratch + at.query_panels);
      pack(grads, width, rows, width, rows, scratch + at.grad_panels);
      product<false>(Left<T>{queries, width, 1}, Panels<T>{scratch + at.keys_turned, width, width}, rows, n, scores,
                     at.columns);
      product<false>(Left<T>{grads, width, 1}, Panels<T>{scratch + at.values, width, width}, rows, n, slopes,
                     at.columns);
      for (int64_t i = 0; i < rows; ++i) {
        const double along = dot(grads + i * width, results + i * width, width);
        const T* stats = static_cast<const T*>(args.stats) + 2 * (head.stats_at + first + i);
        const P largest = P::fill(stats[0]), share = P::fill(stats[1]), mean = P::fill(T(along));
        T *row = scores + i * at.columns, *slope = slopes + i * at.columns;
        for (int64_t j = 0; j < at.columns; j += P::lanes) {
          const P p = exp2((P::load(row + j) - largest) * factor) * share;
          p.store(row + j);
          (p * (P::load(slope + j) - mean)).store(slope + j);
        }
      }
      product<true>(Left<T>{scores, 1, at.columns}, Panels<T>{scratch + at.grad_panels, rows, rows}, n, width,
                    value_grads, at.wide);
      product<true>(Left<T>{slopes, 1, at.columns}, Panels<T>{scratch + at.query_panels, rows, rows}, n, width,
                    key_grads, at.wide);
      product<false>(Left<T>{slopes, at.columns, 1}, Panels<T>{scratch + at.keys, n, n}, rows, width, query_grads,
                     at.wide);
      for (int64_t i = 0; i < rows; ++i) {
        S* to = out + (first + i) * head.row;
        for (int64_t k = 0; k < width; ++k) narrow(T(1 / root) * query_grads[i * at.wide + k], to[k]);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      S* to = out + i * head.row + channels;
      for (int64_t k = 0; k < width; ++k) narrow(T(1 / root) * key_grads[i * at.wide + k], to[k]);
      for (int64_t k = 0; k < width; ++k) narrow(value_grads[i * at.wide + k], to[channels + k]);
    }
  }
}

}  // namespace

void attention_forward(const AttentionArgs& args, int64_t begin, int64_t end, void* scratch) {
  if (args.dtype == DType::float64) return forward<double>(args, begin, end, static_cast<double*>(scratch));
  if (args.dtype == DType::float32) return forward<float>(args, begin, end, static_cast<float*>(scratch));
  forward<BFloat16>(args, begin, end, static_cast<float*>(scratch));
}

void attention_backward(const AttentionArgs& args, int64_t begin, int64_t end, void* scratch) {
  if (args.dtype == DType::float64) return backward<double>(args, begin, end, static_cast<double*>(scratch));
  if (args.dtype == DType::float32) return backward<float>(args, begin, end, static_cast<float*>(scratch));
  backward<BFloat16>(args, begin, end, static_cast<float*>(scratch));
}

int64_t attention_scratch(const AttentionArgs& args, bool backward) {
  if (args.dtype == DType::float64) {
    const Room<double> room(args);
    return int64_t(sizeof(double)) * (backward ? room.backward : room.forward);
  }
  const Room<float> room(args);
  return int64_t(sizeof(float)) * (backward ? room.backward : room.forward);
}

}  // namespace matpac::MATPAC_ISA

#ifdef MATPAC_PORTABLE
namespace matpac {

void attention_cpu(const AttentionArgs& args, bool backward, int threads) {
  const auto kernel = backward ? MATPAC_DISPATCH(attention_backward) : MATPAC_DISPATCH(attention_forward);
  // Of these, some 100 us at least to a thread.
  const int64_t items = args.batch * args.heads * (backward ? 1 : (args.tokens + kBlock - 1) / kBlock);
  const int64_t work = args.tokens * args.width * (backward ? 10 * args.tokens : 4 * kBlock);
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, items / (2000000 / (work + 1) + 1)));
  const int64_t bytes = (MATPAC_DISPATCH(attention_scratch)(args, backward) + 63) / 64 * 64;
  const std::unique_ptr<char[]> scratch(new char[parts * bytes + 64]);
  char* const base = scratch.get() + (64 - reinterpret_cast<uintptr_t>(scratch.get()) % 64);
  parallel_for(parts, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      kernel(args, items * part / parts, items * (part + 1) / parts, base + part * bytes);
    }
  });
}

}  // namespace matpac
#endif
