// log_mel on the CPU.
#include "../common.h"
#include "isa.h"

#include <cmath>

MATPAC_DECLARE(void log_mel_frames(const LogMelArgs& args, int64_t begin, int64_t end))

namespace matpac::MATPAC_ISA {
namespace {

constexpr int kFft = 400;
constexpr int kBins = kFft / 2 + 1;

template <typename In, typename T>
void frames(const LogMelArgs& args, int64_t begin, int64_t end) {
  const T scale = sizeof(In) == sizeof(int16_t) ? T(1) / T(32768) : T(1);
  const T* window = static_cast<const T*>(args.window);
  double cosine[kFft], sine[kFft];
  for (int n = 0; n < kFft; ++n) {
    cosine[n] = std::cos(2 * M_PI * n / kFft);
    sine[n] = std::sin(2 * M_PI * n / kFft);
  }
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / args.frames, t = i % args.frames;
    const In* x = static_cast<const In*>(args.wave) + b * args.stride + t * args.hop;
    double power[kBins];
    for (int k = 0; k < kBins; ++k) {
      double re = 0, im = 0;
      for (int n = 0; n < kFft; ++n) {
        const double v = double(T(x[n]) * scale * window[n]);
        re += v * cosine[n * k % kFft];
        im += v * sine[n * k % kFft];
      }
      power[k] = re * re + im * im;
    }
    const T* weight = static_cast<const T*>(args.weights);
    for (int m = 0; m < args.n_mels; ++m) {
      double mel = 0;
      for (int j = 0; j < args.bands[2 * m + 1]; ++j) mel += double(*weight++) * power[args.bands[2 * m] + j];
      static_cast<T*>(args.out)[(b * args.n_mels + m) * args.frames + t] =
          T((std::log(mel + args.log_offset) - args.mean) / args.std);
    }
  }
}

}  // namespace

void log_mel_frames(const LogMelArgs& args, int64_t begin, int64_t end) {
  switch (args.wave_dtype) {
    case DType::float64: return frames<double, double>(args, begin, end);
    case DType::int16: return frames<int16_t, float>(args, begin, end);
    default: return frames<float, float>(args, begin, end);
  }
}

}  // namespace matpac::MATPAC_ISA

#ifdef MATPAC_PORTABLE
void matpac::log_mel_cpu(const LogMelArgs& args, int threads) {
  const auto kernel = MATPAC_DISPATCH(log_mel_frames);
  parallel_for(args.batch * args.frames, 64, threads,
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}
#endif
