// The part of cpu_linear.h, which includes it, for x86 CPUs with AVX2, FMA and F16C (Haswell, Zen and later): vectors of 8 lanes, layouts "cpu_fma"
// and "cpu_madd".
//
// weight-only: x and weights become float32, the weights in registers; many rows read a panel of float32 weights, scaled.
// dynamic:     int8 weights are widened to int16, of which vpmaddwd multiplies and adds 16 exactly; vpmaddubsw would saturate. int4 weights
//              are unsigned nibbles for vpmaddubsw: |15 * -128 * 2| = 3840, and eight such sums fit int16 before they are widened.
//
// Needs -mavx2 -mfma -mf16c.

// ---- vectors -----------------------------------------------------------------------------------------------------------------------------------

using Floats = __m256;
using Ints = __m256i;
constexpr int kLanes = 8;

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void store(f16* p, Floats v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
inline Floats load(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline void store(bf16* p, Floats v) {  // to nearest, ties to even; a NaN stays one, told by its bits, which -ffast-math believes in
  const Ints bits = _mm256_castps_si256(v), even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const Ints rounded = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7FFF)));
  const Ints nan = _mm256_cmpgt_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF)), _mm256_set1_epi32(0x7F800000));
  const Ints high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan), 16);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}

// the first n of 8 elements of x, y or bias; the others are not touched
template <class T> inline Floats load_part(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T part[kLanes] = {};
  memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T> inline void store_part(T* p, int64_t n, Floats v) {
  if (n >= kLanes) return store(p, v);
  T part[kLanes];
  store(part, v);
  memcpy(p, part, n * sizeof(T));
}

// v is in a register here, and what is pinned is computed in this order
template <class T> AOQUANT_INLINE void pin(T& v) { asm volatile("" : "+x"(v)); }

inline Floats splat(float v) { return _mm256_set1_ps(v); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats fnmadd(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
inline Ints to_ints(Floats a) { return _mm256_cvtps_epi32(a); }
inline Ints sub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline Ints mul(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
// float and int32 accumulators under one name
inline Ints splat(int32_t v) { return _mm256_set1_epi32(v); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Floats load_acc(const float* t, Floats) { return _mm256_loadu_ps(t); }
inline Ints load_acc(const float* t, Ints) { return _mm256_loadu_si256((const Ints*)t); }
inline void store_acc(float* t, Floats a) { _mm256_storeu_ps(t, a); }
inline void store_acc(float* t, Ints a) { _mm256_storeu_si256((Ints*)t, a); }
inline Floats to_float(Floats a) { return a; }
inline Floats to_float(Ints a) { return _mm256_cvtepi32_ps(a); }

// ---- decoders: one packed row -> b[0 .. NR - 1], the columns 8 (First + j) .. 8 (First + j) + 7 ----------------------------------------------------

// Of one k of the step's two. Bias: decoded value - q; int4's is taken back through the row sums of x, which is an instruction less for a value.
template <int Bits> struct DecodeFloats;

template <> struct DecodeFloats<8> {
  static constexpr int Bits = 8, Bytes = 64, Bias = 0;
  template <int K, int First, int NR> AOQUANT_INLINE void get(const uint8_t* p, Floats* b) const {
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) b[j] = to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 32 * K + 8 * (First + j)))));
  }
};

template <> struct DecodeFloats<4> {
  static constexpr int Bits = 4, Bytes = 32, Bias = 8;
  template <int K, int First, int NR> AOQUANT_INLINE void get(const uint8_t* p, Floats* b) const {
    const Ints code = _mm256_loadu_si256((const Ints*)p), nibble = splat(15);
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) b[j] = to_float(_mm256_and_si256(_mm256_srli_epi32(code, 16 * K + 4 * (First + j)), nibble));
  }
};

// A panel that expand() wrote: scaled float32, nothing left to decode.
struct DecodePanel {
  static constexpr int Bits = 32, Bytes = 256, Bias = 0;
  template <int K, int First, int NR> AOQUANT_INLINE void get(const uint8_t* p, Floats* b) const {
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      b[j] = load((const float*)p + 32 * K + 8 * (First + j));
      pin(b[j]);  // GCC would load it again for every row, half as fast
    }
  }
};

struct DecodeInt16 {  // lanes of two int16: k, k + 1
  static constexpr int Bits = 8, Bytes = 64, Bias = 0;
  template <int First, int NR> AOQUANT_INLINE void get(const uint8_t* p, Ints* b) const {
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) b[j] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(p + 16 * (First + j))));
  }
};

struct DecodeNibbles {  // lanes of four unsigned bytes: k .. k + 3
  static constexpr int Bits = 4, Bytes = 64, Bias = 8;
  template <int First, int NR> AOQUANT_INLINE void get(const uint8_t* p, Ints* b) const {
    const Ints nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 2
    for (int j = 0; j < NR; j += 2) {
      const Ints code = _mm256_loadu_si256((const Ints*)(p + 16 * (First + j)));
      b[j] = _mm256_and_si256(code, nibble);
      b[j + 1] = _mm256_and_si256(_mm256_srli_epi16(code, 4), nibble);
    }
  }
};

// ---- kinds: what x is, how steps multiply, how a row of x is summed ------------------------------------------------------------------------------

template <class T> inline int32_t sum_of(const T* x, int64_t n) {
  int32_t s = 0;
  for (int64_t k = 0; k < n; ++k) s += x[k];
  return s;
}

template <class XT, class D> struct FP32x {  // whatever XT is, it is staged as float
  using X = XT;
  using Staged = float;
  using Sum = float;
  using Decode = D;
  using Acc = Floats;
  static constexpr bool Expands = true;
  static constexpr int KStep = 2, Burst = 1;
  template <int K, int MR, int First, int NR> static AOQUANT_INLINE void dot(Acc (*acc)[NR], const D& decode, const float* x, int64_t ldx, const uint8_t* w) {
    Floats b[NR];
    decode.template get<K, First, NR>(w, b);
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m) {
      const Floats a = splat(x[m * ldx + K]);
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) acc[m][j] = fmadd(a, b[j], acc[m][j]);
    }
  }
  template <int MR, int First, int NR> static AOQUANT_INLINE void steps(Acc (*acc)[NR], const D& decode, const float* x, int64_t ldx, const uint8_t* w, int64_t) {
    dot<0, MR, First, NR>(acc, decode, x, ldx, w);
    dot<1, MR, First, NR>(acc, decode, x, ldx, w);
  }
  static float sum(const float* x, int64_t n) {
    Floats s{};
    for (int64_t k = 0; k < n; k += kLanes) s = add(s, load_part(x + k, n - k));
    float part[kLanes], total = 0;
    store(part, s);
    for (float v : part) total += v;
    return total;
  }
};

struct I16xI8 {
  using X = int8_t;
  using Staged = int16_t;
  using Sum = int32_t;
  using Decode = DecodeInt16;
  using Acc = Ints;
  static constexpr bool Expands = false;
  static constexpr int KStep = 2, Burst = 1;
  template <int MR, int First, int NR>
  static AOQUANT_INLINE void steps(Acc (*acc)[NR], const Decode& decode, const int16_t* x, int64_t ldx, const uint8_t* w, int64_t) {
    Ints b[NR];
    decode.template get<First, NR>(w, b);
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m) {
      const Ints a = splat(word(x + m * ldx));
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) acc[m][j] = add(acc[m][j], _mm256_madd_epi16(b[j], a));
    }
  }
  static int32_t sum(const int16_t* x, int64_t n) { return sum_of(x, n); }
};

struct I8xNibbles {
  using X = int8_t;
  using Staged = int8_t;
  using Sum = int32_t;
  using Decode = DecodeNibbles;
  using Acc = Ints;
  static constexpr bool Expands = false;
  static constexpr int KStep = 4, Burst = 8;
  template <int MR, int First, int NR>
  static AOQUANT_INLINE void steps(Acc (*acc)[NR], const Decode& decode, const int8_t* x, int64_t ldx, const uint8_t* w, int64_t count) {
    Ints sums[MR][NR] = {};  // of int16
    for (int64_t i = 0; i < count; ++i) {
      Ints b[NR];
      decode.template get<First, NR>(w + i * Decode::Bytes, b);
#pragma GCC unroll 6
      for (int m = 0; m < MR; ++m) {
        Ints a = splat(word(x + m * ldx + i * KStep));
        pin(a);  // GCC would load all rows first, and leave sums in memory
#pragma GCC unroll 4
        for (int j = 0; j < NR; ++j) {
          sums[m][j] = _mm256_add_epi16(sums[m][j], _mm256_maddubs_epi16(b[j], a));
          pin(sums[m][j]);
        }
      }
    }
    const Ints ones = _mm256_set1_epi16(1);
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) acc[m][j] = add(acc[m][j], _mm256_madd_epi16(sums[m][j], ones));
  }
  static int32_t sum(const int8_t* x, int64_t n) { return sum_of(x, n); }
};

template <class X, int Bits> struct WeightOnlyKind { using type = FP32x<X, DecodeFloats<Bits>>; };
template <int Bits> using DynamicKind = std::conditional_t<Bits == 8, I16xI8, I8xNibbles>;
template <class Kind> using ExpandedKind = FP32x<typename Kind::X, DecodePanel>;  // reads what expand<Kind> wrote

// Of the 4 registers of a packed row, how many one pass over it takes: at most 12 of 16 registers are accumulators. The sums of groups are seldom
// in use and may leave theirs.
constexpr int registers(int rows, bool grouped) { return rows > (grouped ? 1 : 2) ? 2 : 4; }

template <class Kind, int MR, int First, int NR>
AOQUANT_INLINE void take_steps(typename Kind::Acc (*acc)[NR], const typename Kind::Decode& decode, const typename Kind::Staged* x, int64_t ldx,
                               const uint8_t* w, int64_t count) {
  Kind::template steps<MR, First, NR>(acc, decode, x, ldx, w, count);
}

// ---- panels ------------------------------------------------------------------------------------------------------------------------------------

// kColumns columns from n, steps s0 .. s1 - 1 of w -> panel as DecodePanel reads it: q * scale + offset, or q where there is one group.
template <class Kind, class P> void expand(const P& p, int64_t n, const uint8_t* w, int64_t s0, int64_t s1, uint8_t* panel) {
  const typename Kind::Decode decode;
  const bool grouped = p.groups() > 1;
  const int64_t n_pad = p.n_pad(), group_steps = grouped ? p.group / Kind::KStep : s1;
  for (int64_t s = s0; s < s1;) {
    const int64_t g = s / group_steps, end = std::min(s1, (g + 1) * group_steps);
    Floats scale[4], offset[4];
    for (int j = 0; j < 4; ++j) {
      scale[j] = grouped ? load(p.scale + g * n_pad + n + kLanes * j) : splat(1.0f);
      const Floats zero = grouped && p.offset ? load(p.offset + g * n_pad + n + kLanes * j) : Floats{};
      offset[j] = fnmadd(splat((float)Kind::Decode::Bias), scale[j], zero);
    }
    for (; s < end; ++s, w += Kind::Decode::Bytes, panel += DecodePanel::Bytes) {
      Floats b[8];
      decode.template get<0, 0, 4>(w, b);
      decode.template get<1, 0, 4>(w, b + 4);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) store((float*)panel + kLanes * i, fmadd(b[i], scale[i % 4], offset[i % 4]));
    }
  }
}

constexpr int64_t kBlockRows = 192;            // rows of x kept near while the columns pass
constexpr int64_t kPanelBytes = 128 * 1024;    // packed weights kept in L2 while the rows pass
constexpr int64_t kExpandedBytes = 64 * 1024;  // the same of a panel that was expanded
constexpr int64_t kExpandRows = 13;            // EPYC Zen 3, K = N = 2048: three tiles pay for it, int4 18 rows: 46 -> 64 GFLOP/s

// Columns n .. n + 31 of w, layout "cpu_fma" -> to, layout "cpu_madd" of 8 bits: round(w / row).
template <int Bits>
void requantize_columns(int64_t n, int64_t n_pad, int64_t K, const uint8_t* w, const float* scale, const float* offset, int64_t group, const float* row,
                        uint8_t* to) {
  using Decode = DecodeFloats<Bits>;
  const Decode decode;
  const int64_t steps = ceil_div(K, 2), G = group > 0 && group < K ? ceil_div(K, group) : 1, group_steps = G > 1 ? group / 2 : steps;
  const Ints byte = splat(0xFF);
  const Floats bias = splat(-(float)Decode::Bias);
  Floats one[4], s[4], z[4];
  for (int j = 0; j < 4; ++j) one[j] = _mm256_div_ps(splat(1.0f), load(row + n + kLanes * j));
  w += n / 32 * G * group_steps * Decode::Bytes;
  to += n / 32 * steps * DecodeInt16::Bytes;
  for (int64_t step = 0; step < steps; ++step, w += Decode::Bytes, to += DecodeInt16::Bytes) {
    if (step % group_steps == 0)
      for (int j = 0; j < 4; ++j) {
        const int64_t at = step / group_steps * n_pad + n + kLanes * j;
        s[j] = mul(load(scale + at), one[j]);
        z[j] = offset ? mul(load(offset + at), one[j]) : Floats{};
      }
    Floats first[4], second[4];
    decode.template get<0, 0, 4>(w, first);
    decode.template get<1, 0, 4>(w, second);
    Ints pairs[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      // the bias is taken back before the one rounding: half of a row's largest value is a tie, and frequent
      const Floats even = add(first[j], bias), odd = add(second[j], bias);
      const Ints low = to_ints(fmadd(even, s[j], z[j])), high = to_ints(fmadd(odd, s[j], z[j]));
      pairs[j] = _mm256_or_si256(_mm256_and_si256(low, byte), _mm256_slli_epi32(_mm256_and_si256(high, byte), 8));
    }
    for (int j = 0; j < 4; j += 2)  // packus works within halves: put the quarters in order
      _mm256_storeu_si256((Ints*)(to + 16 * j), _mm256_permute4x64_epi64(_mm256_packus_epi32(pairs[j], pairs[j + 1]), 0xD8));
  }
}
