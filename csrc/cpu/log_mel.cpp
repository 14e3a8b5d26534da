// log_mel on the CPU: one pass over the wave, a frame in every SIMD lane.
//
// A tile is two vectors of consecutive frames of a clip. Its samples are turned once, so that a sample of neighbouring
// frames lies in neighbouring floats: sample n = q * hop + r of frame f is turned[r][f + q]. Then the rows and columns
// of fft400.h for each vector of frames, the banded mel, the logarithm and one store a mel. The lanes never meet, so a
// frame's bits depend neither on its neighbours nor on how the work was divided.
#include <math.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "../common.h"
#include "../fft400.h"
#include "../log_mel_math.h"
#include "isa.h"
#include "simd.h"
#include "threads.h"

MATPAC_DECLARE(void log_mel_spans(const LogMelArgs& args, int64_t begin, int64_t end))

namespace {

constexpr int kSpan = 64;  // frames of one clip that stay on one thread: whole tiles for every instruction set

// The rounding of a float32 transform is noise some 140 dB below the frame's energy. Where a band's mean power lies
// below this share of the energy (75 dB), as in a chirp over silence, the noise would show by 1e-4 and more: the frame
// is transformed in double. The lower the share, the fewer frames take the time of it; music and speech do now and
// then.
constexpr double kFloatRange = 0x1p-25;

int64_t spans_of(const matpac::LogMelArgs& args) { return (args.frames + kSpan - 1) / kSpan; }

}  // namespace

namespace matpac::MATPAC_ISA {
namespace {

using namespace fft400;

// Tables of the transform: the sample that a row takes at a, and where the power of a column's output j goes when a
// bin takes `step` numbers.
struct Samples {
  uint16_t at[kRows][kRowPoints];
};
struct Places {
  uint16_t at[kColumns][16];
};
constexpr Samples make_samples() {
  Samples samples{};
  for (int b = 0; b < kRows; ++b) {
    for (int a = 0; a < kRowPoints; ++a) samples.at[b][a] = uint16_t(sample_of(b, a));
  }
  return samples;
}
constexpr Places make_places(int step) {
  Places places{};
  for (int c = 0; c < kColumns; ++c) {
    for (int j = 0; j < 16; ++j) places.at[c][j] = uint16_t(step * bin_of(c, j));
  }
  return places;
}

template <typename T>
class Normaliser;

template <>
class Normaliser<float> {
 public:
  Normaliser(double mean, double std) : normaliser_(mean, std) {}
  MATPAC_INLINE Vector<float> operator()(Vector<float> x) const { return normaliser_.of<Lanes<float>>(x); }

 private:
  LogNormaliser normaliser_;
};

template <>
class Normaliser<double> {
 public:
  Normaliser(double mean, double std) : mean_(mean), std_(std) {}

  MATPAC_INLINE Vector<double> operator()(Vector<double> x) const {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = (log(x[i]) - mean_) / std_;
    return x;
  }

 private:
  double mean_, std_;
};

MATPAC_INLINE Quad load_quad(const float* x) {
  Quad v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}
MATPAC_INLINE Quad load_quad(const int16_t* x) {
  typedef int16_t Shorts __attribute__((vector_size(8)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  Shorts v;
  std::memcpy(&v, x, sizeof(v));
  return __builtin_convertvector(__builtin_convertvector(v, Ints), Quad);
}

// As many numbers of type T as a vector of W has, converted.
template <typename W, typename T>
MATPAC_INLINE Vector<W> load_as(const T* from) {
  typedef T Narrow __attribute__((vector_size(kLanes<W> * sizeof(T))));
  Narrow v;
  std::memcpy(&v, from, sizeof(v));
  return __builtin_convertvector(v, Vector<W>);
}
template <typename W, typename T>
MATPAC_INLINE void store_as(T* to, Vector<W> value) {
  typedef T Narrow __attribute__((vector_size(kLanes<W> * sizeof(T))));
  const Narrow v = __builtin_convertvector(value, Narrow);
  std::memcpy(to, &v, sizeof(v));
}

template <typename In, typename T>
class Kernel {
  using V = Vector<T>;
  using Mask = uint32_t;  // a bit a frame of the tile
  static constexpr int kVectors = 2;
  static constexpr int kTile = kVectors * kLanes<T>;
  static constexpr Samples kSamples = make_samples();
  static constexpr Places kPlaces = make_places(kTile);
  static_assert(kSpan % kTile == 0 && kTile <= 32);

 public:
  explicit Kernel(const LogMelArgs& args)
      : args_(args),
        normalise_(args.mean, args.std),
        hop_(int(std::min<int64_t>(args.hop, kSize))),
        pitch_((kTile + (kSize - 1) / hop_ + 7) / 8 * 8) {
    const double scale = std::is_same_v<In, int16_t> ? 1.0 / 32768 : 1.0;
    for (int b = 0; b < kRows; ++b) {
      for (int a = 0; a < kRowPoints; ++a) {
        const int n = kSamples.at[b][a];
        window_[b][a] = args.window[n] * scale;
        narrow_window_[b][a] = T(window_[b][a]);
        offset_[b][a] = uint32_t(n % hop_ * pitch_ + n / hop_);
      }
    }
  }

  void span(int64_t clip, int64_t begin) {
    const In* wave = static_cast<const In*>(args_.wave) + clip * args_.stride;
    T* out = static_cast<T*>(args_.out) + clip * args_.n_mels * args_.frames;
    const int64_t end = std::min<int64_t>(begin + kSpan, args_.frames);
    for (int64_t frame = begin; frame < end; frame += kTile) {
      const int frames = int(std::min<int64_t>(end - frame, kTile));
      turn_tile(wave + frame * args_.hop, frames);
      for (int lane = 0; lane < kTile; lane += kLanes<T>) transform<T>(lane);
      const Mask all = Mask((uint64_t(1) << frames) - 1);
      Mask coarse = write(out + frame, all) & all;
      if constexpr (std::is_same_v<T, float>) {
        if (coarse) {
          constexpr Mask group = (Mask(1) << kLanes<double>)-1;
          for (int lane = 0; lane < kTile; lane += kLanes<double>) {
            if (coarse & (group << lane)) transform<double>(lane);
          }
          write(out + frame, coarse);
        }
      }
    }
  }

 private:
  // turned[r][j] = x[j * hop + r] for every sample of the tile's `frames`. The other lanes keep what they had.
  void turn_tile(const In* x, int frames) {
    const int64_t hop = args_.hop;
    const int columns = frames + (kSize - 1) / hop_;
    int j = 0;
    if constexpr (std::is_same_v<T, float>) {
      for (; j + kLanes<float> <= frames; j += kLanes<float>) turn_columns(x + j * hop, turned_ + j);
    }
    for (; j < columns; ++j) {
      const In* from = x + j * hop;
      const int count = j < frames ? hop_ : std::min(hop_, kSize - (j - frames + 1) * hop_);
      T* to = turned_ + j;
      for (int r = 0; r < count; ++r, to += pitch_) *to = T(from[r]);
    }
  }

  // A vector's worth of columns.
  MATPAC_INLINE void turn_columns(const In* x, float* to) {
    constexpr int kQuads = kLanes<float> / 4;
    const int64_t hop = args_.hop, pitch = pitch_;
    const int count = hop_;
    int r = 0;
    for (; r + 4 <= count; r += 4, x += 4, to += 4 * pitch) {
      Vector<float> rows[4];
      MATPAC_UNROLL
      for (int i = 0; i < 4; ++i) {
        Quad quads[kQuads];
        MATPAC_UNROLL
        for (int q = 0; q < kQuads; ++q) quads[q] = load_quad(x + (4 * q + i) * hop);
        rows[i] = join(quads);
      }
      turn(rows);
      MATPAC_UNROLL
      for (int i = 0; i < 4; ++i) store(to + i * pitch, rows[i]);
    }
    for (; r < count; ++r, ++x, to += pitch) {
      for (int j = 0; j < kLanes<float>; ++j) to[j] = float(x[j * hop]);
    }
  }

  template <typename W>
  const W* window(int b) const {
    if constexpr (std::is_same_v<W, double>) {
      return window_[b];
    } else {
      return narrow_window_[b];
    }
  }

  // The powers of the frames from `lane` on, as many as a vector of W has, and their sum.
  template <typename W>
  void transform(int lane) {
    using N = Lanes<W>;
    const T* samples = turned_ + lane;
    W* spectrum = reinterpret_cast<W*>(spectrum_);
    T* power = power_ + lane;
    for (int b = 0; b < kRows; ++b) {
      const uint32_t* offset = offset_[b];
      const W* window = this->template window<W>(b);
      W* out = spectrum + b * kRowPoints * kLanes<W>;
      row<N>([=](int a) MATPAC_LAMBDA { return load_as<W>(samples + offset[a]) * broadcast(window[a]); },
             [=](int i, Vector<W> value) MATPAC_LAMBDA { store(out + i * kLanes<W>, value); });
    }
    const auto entry = [=](int b, int i) MATPAC_LAMBDA { return load(spectrum + (b * kRowPoints + i) * kLanes<W>); };
    Vector<W> energy{};
    column_real<N>([=](int b) MATPAC_LAMBDA { return entry(b, 0); },
                   [=, &energy](int j, Vector<W> value) MATPAC_LAMBDA {
                     energy += value;
                     store_as<W>(power + kPlaces.at[0][j], value);
                   });
    for (int c = 1; c < kColumns; ++c) {
      const uint16_t* place = kPlaces.at[c];
      column<N>([=](int b) MATPAC_LAMBDA { return entry(b, 2 * c - 1); },
                [=](int b) MATPAC_LAMBDA { return entry(b, 2 * c); },
                [=, &energy](int j, Vector<W> value) MATPAC_LAMBDA {
                  energy += value;
                  store_as<W>(power + place[j], value);
                });
    }
    store_as<W>(energy_ + lane, energy);
  }

  // Mel, logarithm and normalisation of the frames in `mask`. Returns the frames that have a band too quiet for the
  // rounding errors of a float32 transform.
  Mask write(T* const first, Mask mask) {
    const T* weight = static_cast<const T*>(args_.weights);
    const T* inverse_sum = static_cast<const T*>(args_.inverse_sums);
    const V offset = broadcast(T(args_.log_offset));
    V total[kVectors] = {}, least[kVectors] = {};
    for (V& v : least) v = broadcast(std::numeric_limits<T>::max());
    T* out = first;
    for (int m = 0; m < args_.n_mels; ++m, out += args_.frames) {
      const T* power = power_ + kTile * args_.bands[3 * m];
      V mel[kVectors] = {offset, offset};
      for (int j = args_.bands[3 * m + 1]; j > 0; --j, power += kTile, ++weight) {
        const V w = broadcast(*weight);
        for (int v = 0; v < kVectors; ++v) mel[v] = fma(load(power + v * kLanes<T>), w, mel[v]);
      }
      const V scale = broadcast(inverse_sum[m]);
      V y[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const V mean = mel[v] * scale;
        least[v] = mean < least[v] ? mean : least[v];
        total[v] += mel[v];
        y[v] = normalise_(mel[v]);
      }
      if (mask == Mask((uint64_t(1) << kTile) - 1)) {
        for (int v = 0; v < kVectors; ++v) store(out + v * kLanes<T>, y[v]);
      } else {
        for (Mask rest = mask; rest; rest &= rest - 1) {
          const int f = __builtin_ctz(rest);
          out[f] = y[f / kLanes<T>][f % kLanes<T>];
        }
      }
    }
    Mask coarse = 0;
    for (Mask rest = mask; rest; rest &= rest - 1) {
      const int f = __builtin_ctz(rest);
      if (least[f / kLanes<T>][f % kLanes<T>] < energy_[f] * T(kFloatRange)) coarse |= Mask(1) << f;
      // Where a mel was infinite or NaN, or could be zero or subnormal, the vector logarithm does not hold.
      if (!(total[f / kLanes<T>][f % kLanes<T>] <= std::numeric_limits<T>::max()) ||
          args_.log_offset < std::numeric_limits<T>::min()) {
        write_special(f, first + f);
      }
    }
    return coarse;
  }

  // Again, for the frame f of the tile, the values that are no normal numbers.
  __attribute__((noinline)) void write_special(int f, T* out) {
    const T* weight = static_cast<const T*>(args_.weights);
    for (int m = 0; m < args_.n_mels; ++m, out += args_.frames) {
      T mel = T(args_.log_offset);
      for (int j = 0; j < args_.bands[3 * m + 1]; ++j) {
        mel += power_[kTile * (args_.bands[3 * m] + j) + f] * *weight++;
      }
      if (!(mel >= std::numeric_limits<T>::min() && mel <= std::numeric_limits<T>::max())) {
        *out = T((log(double(mel)) - args_.mean) / args_.std);
      }
    }
  }

  const LogMelArgs args_;
  const Normaliser<T> normalise_;
  const int hop_, pitch_;  // hop_ is at most a window: what lies between windows is not read
  double window_[kRows][kRowPoints];
  T narrow_window_[kRows][kRowPoints];
  uint32_t offset_[kRows][kRowPoints];
  alignas(kVectorBytes) unsigned char spectrum_[kRows * kRowPoints * kVectorBytes];
  alignas(kVectorBytes) T power_[kBins * kTile];
  T energy_[kTile];
  alignas(kVectorBytes) T turned_[kSize * (kTile + 8) + kSize] = {};
};

template <typename In, typename T>
void spans(const LogMelArgs& args, int64_t begin, int64_t end) {
  Kernel<In, T> kernel(args);
  const int64_t per_clip = spans_of(args);
  for (int64_t i = begin; i < end; ++i) kernel.span(i / per_clip, i % per_clip * kSpan);
}

}  // namespace

void log_mel_spans(const LogMelArgs& args, int64_t begin, int64_t end) {
  switch (args.wave_dtype) {
    case DType::float64:
      return spans<double, double>(args, begin, end);
    case DType::int16:
      return spans<int16_t, float>(args, begin, end);
    default:
      return spans<float, float>(args, begin, end);
  }
}

}  // namespace matpac::MATPAC_ISA

#ifdef MATPAC_PORTABLE
void matpac::log_mel_cpu(const LogMelArgs& args, int threads) {
  const auto kernel = MATPAC_DISPATCH(log_mel_spans);
  // Ten seconds are 16 spans and take 0.2 ms, less than it can cost to wake a thread that sleeps.
  constexpr int64_t spans_worth_a_thread = 24;
  parallel_for(args.batch * spans_of(args), spans_worth_a_thread, threads,
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}
#endif
