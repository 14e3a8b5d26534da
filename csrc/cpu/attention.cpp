// Softmax attention on the CPU, a head of a sample at a time. Its keys and values are packed once, for products whose
// tiles stay in registers; queries go by in blocks whose scores stay in a cache. What is stored as S is computed as T:
// bfloat16 is widened where it is packed, and rounded once, in the result. Where the instruction set multiplies
// bfloat16 it stays as it is, and probabilities and their gradients are rounded to it before they are multiplied.
#include <cmath>
#include <memory>

#include "../common.h"
#include "isa.h"
#include "pack.h"
#include "product.h"
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

constexpr double kLog2e = 1.44269504088896340736;

// Where everything of a head lies in the scratch memory, in elements of T; a factor's F is no larger.
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
  int64_t slopes_along = value_grads + all * wide, backward = slopes_along + block * columns / 2;

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

template <typename S, typename T = Computed<S>>
MATPAC_INLINE Pack<T> load_pack(const S* from) {
  Pack<T> out;
  for (int i = 0; i < Pack<T>::parts; ++i) out.part[i] = load_wide(from + i * kLanes<T>);
  return out;
}

// The sum of x * y.
template <typename S, typename T = Computed<S>>
MATPAC_INLINE double dot(const S* x, const S* y, int64_t n) {
  using P = Pack<T>;
  P sum = P::fill(T(0));
  const int64_t whole = n / P::lanes * P::lanes;
  for (int64_t i = 0; i < whole; i += P::lanes) sum = sum + load_pack(x + i) * load_pack(y + i);
  if (whole < n) {
    T rest[2][P::lanes] = {};
    for (int64_t i = whole; i < n; ++i) rest[0][i - whole] = widen(x[i]), rest[1][i - whole] = widen(y[i]);
    sum = sum + P::load(rest[0]) * P::load(rest[1]);
  }
  return sum.sum();
}

// Scores as factors: of a row, which follow each other along the sum, and of the rows that follow each other there.
template <typename T>
MATPAC_INLINE void store_along(const Pack<T>& x, T* row, int64_t j) {
  x.store(row + j);
}
template <typename T>
MATPAC_INLINE void store_across(const Pack<T> (&x)[1], T* row, int64_t j) {
  x[0].store(row + j);
}
#if defined(__AVX512BF16__)
MATPAC_INLINE void store_along(const Pack<float>& x, Pair* row, int64_t j) {
  const __m256i halves = (__m256i)_mm512_cvtneps_pbh(x.part[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + j / 2), halves);
}
MATPAC_INLINE void store_across(const Pack<float> (&x)[2], Pair* row, int64_t j) {
  const __m256i first = (__m256i)_mm512_cvtneps_pbh(x[0].part[0]), second = (__m256i)_mm512_cvtneps_pbh(x[1].part[0]);
  _mm512_storeu_si512(row + j, pairs(first, second));
}
#endif

// Of the blocks of queries of all heads those from `begin` to `end`.
template <typename S, typename T = Computed<S>>
void forward(const AttentionArgs& args, int64_t begin, int64_t end, T* scratch) {
  using P = Pack<T>;
  using F = Factor<S>;
  const Room<T> at(args);
  const auto factors = [scratch](int64_t where) { return reinterpret_cast<F*>(scratch + where); };
  const int64_t n = args.tokens, width = args.width, deep = steps<F>(width);
  const P factor = P::fill(T(kLog2e / std::sqrt(double(width))));
  T *scores = scratch + at.scores, *weighed = scratch + at.out;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t item = i / blocks, first = i % blocks * kBlock, rows = n - first < kBlock ? n - first : kBlock;
    const Head<S> head(args, item);
    if (i == begin || first == 0) {
      pack_turned(head.key, head.row, n, width, factors(at.keys_turned));
      pack(head.value, head.row, n, width, factors(at.values));
    }
    copy(head.query + first * head.row, head.row, rows, width, factors(at.queries));
    product<false>(Left<F>{factors(at.queries), deep, 1}, Panels<F>{factors(at.keys_turned), deep}, rows, n, scores,
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
        store_along(p, reinterpret_cast<F*>(row), j);  // over scores that have been read
        sum = sum + p;
      }
      total[q] = T(1 / sum.sum());
      if (T* stats = static_cast<T*>(args.stats)) {
        stats += 2 * (head.stats_at + first + q);
        stats[0] = largest, stats[1] = total[q];
      }
    }
    product<false>(Left<F>{factors(at.scores), at.columns, 1}, Panels<F>{factors(at.values), steps<F>(n)}, rows, width,
                   weighed, at.wide);
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
  using F = Factor<S>;
  constexpr int side = kSteps<F>;  // rows that are side by side where the sum is over queries
  const Room<T> at(args);
  const auto factors = [scratch](int64_t where) { return reinterpret_cast<F*>(scratch + where); };
  const int64_t n = args.tokens, width = args.width, channels = args.heads * width, deep = steps<F>(width);
  const double root = std::sqrt(double(width));
  const P factor = P::fill(T(kLog2e / root));
  T *scores = scratch + at.scores, *slopes = scratch + at.slopes, *query_grads = scratch + at.out;
  T *key_grads = scratch + at.key_grads, *value_grads = scratch + at.value_grads;
  // Rows of slopes, for the sum over keys: those of T are where they are.
  F* const along = side == 1 ? factors(at.slopes) : factors(at.slopes_along);
  const int64_t along_row = at.columns / side;
  for (int64_t item = begin; item < end; ++item) {
    const Head<S> head(args, item);
    pack_turned(head.key, head.row, n, width, factors(at.keys_turned));
    pack_turned(head.value, head.row, n, width, factors(at.values));
    pack(head.key, head.row, n, width, factors(at.keys));
    for (int64_t i = 0; i < at.all * at.wide; ++i) key_grads[i] = value_grads[i] = T(0);
    S* out = static_cast<S*>(args.out) + head.qkv_at;
    for (int64_t first = 0; first < n; first += kBlock) {
      const int64_t rows = n - first < kBlock ? n - first : kBlock;
      const S* query = head.query + first * head.row;
      const S* grad = static_cast<const S*>(args.grad) + head.out_at + first * head.out_row;
      const S* result = static_cast<const S*>(args.result) + head.out_at + first * head.out_row;
      copy(query, head.row, rows, width, factors(at.queries));
      copy(grad, head.out_row, rows, width, factors(at.grads));
      pack(query, head.row, rows, width, factors(at.query_panels));
      pack(grad, head.out_row, rows, width, factors(at.grad_panels));
      product<false>(Left<F>{factors(at.queries), deep, 1}, Panels<F>{factors(at.keys_turned), deep}, rows, n, scores,
                     at.columns);
      product<false>(Left<F>{factors(at.grads), deep, 1}, Panels<F>{factors(at.values), deep}, rows, n, slopes,
                     at.columns);
      for (int64_t i = 0; i < rows; i += side) {
        T *row = scores + i * at.columns, *slope = slopes + i * at.columns;
        P largest[side], share[side], mean[side];
        for (int s = 0; s < side; ++s) {
          for (int64_t j = n; j < at.columns; ++j) row[s * at.columns + j] = -INFINITY;
          if (i + s >= rows) continue;
          const T* stats = static_cast<const T*>(args.stats) + 2 * (head.stats_at + first + i + s);
          const int64_t from = (i + s) * head.out_row;
          largest[s] = P::fill(stats[0]), share[s] = P::fill(stats[1]);
          mean[s] = P::fill(T(dot(grad + from, result + from, width)));
        }
        for (int64_t j = 0; j < at.columns; j += P::lanes) {
          P p[side], ds[side];
          for (int s = 0; s < side; ++s) {
            p[s] = ds[s] = P::fill(T(0));
            if (i + s >= rows) continue;
            const int64_t to = s * at.columns + j;
            p[s] = exp2((P::load(row + to) - largest[s]) * factor) * share[s];
            ds[s] = p[s] * (P::load(slope + to) - mean[s]);
            if (side > 1) store_along(ds[s], along + (i + s) * along_row, j);
          }
          store_across(p, reinterpret_cast<F*>(row), j);
          store_across(ds, reinterpret_cast<F*>(slope), j);
        }
      }
      product<true>(Left<F>{factors(at.scores), 1, side * at.columns},
                    Panels<F>{factors(at.grad_panels), steps<F>(rows)}, n, width, value_grads, at.wide);
      product<true>(Left<F>{factors(at.slopes), 1, side * at.columns},
                    Panels<F>{factors(at.query_panels), steps<F>(rows)}, n, width, key_grads, at.wide);
      product<false>(Left<F>{along, along_row, 1}, Panels<F>{factors(at.keys), steps<F>(n)}, rows, width, query_grads,
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
  const auto kernel = backward ? MATPAC_DISPATCH_BF16(attention_backward) : MATPAC_DISPATCH_BF16(attention_forward);
  // Of these, some 100 us at least to a thread.
  const int64_t items = args.batch * args.heads * (backward ? 1 : (args.tokens + kBlock - 1) / kBlock);
  const int64_t work = args.tokens * args.width * (backward ? 10 * args.tokens : 4 * kBlock);
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, items / (2000000 / (work + 1) + 1)));
  const int64_t bytes = (MATPAC_DISPATCH_BF16(attention_scratch)(args, backward) + 63) / 64 * 64;
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
