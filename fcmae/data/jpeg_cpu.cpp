// The part of a JPEG that a crop needs, decoded by libjpeg-turbo and resized as the rows come. Built by native.py, called
// by jpeg.py.
//
// libjpeg-turbo is one that torchvision or Pillow brought, and has no headers there: what is used of its interface is
// declared here. It has been the same since 1998 but for the end of a structure, which version 8 made longer; a library
// refuses if version or size are not its own. Columns outside the crop are neither transformed nor converted, rows above
// neither, rows below are not read at all.
//
// Resizing is antialiased bicubic (a = -0.5), as Pillow's: rows are combined first, then the columns of several combined
// rows at a time, in floating point and rounded once.

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr struct {
    int version;
    size_t size;
} INTERFACES[] = {{62, 632}, {80, 656}};
enum Colourspace { GREY = 1, RGBX = 7 };

struct ErrorManager {
    void (*error_exit)(void*);
    void (*emit_message)(void*, int);
    void (*output_message)(void*);
    void (*format_message)(void*, char*);
    void (*reset)(void*);
    int code;
    char parameters[80];
    int trace_level;
    long warnings;
    const void* tables[4];
};

struct Decompress {
    ErrorManager* errors;
    void* managers[3];
    int is_decompressor, state;
    void* source;
    unsigned image_width, image_height;
    int components, colourspace, out_colourspace;
    unsigned scale_numerator, scale_denominator;
    double gamma;
    int buffered, raw, transform, fancy_upsampling, smoothing, quantize, dither, two_pass, colours, passes[3];
    unsigned output_width, output_height;
    int out_colours, out_components, rows_at_once, actual_colours;
    void* colour_map;
    unsigned output_row;
    unsigned char rest[484];
};
static_assert(sizeof(ErrorManager) == 168 && offsetof(ErrorManager, warnings) == 128);
static_assert(sizeof(Decompress) == INTERFACES[1].size && offsetof(Decompress, out_colourspace) == 64);
static_assert(offsetof(Decompress, output_width) == 136 && offsetof(Decompress, output_row) == 168);

struct {
    int version;
    size_t size;
    ErrorManager* (*std_error)(ErrorManager*);
    void (*create)(Decompress*, int, size_t);
    void (*destroy)(Decompress*);
    void (*mem_src)(Decompress*, const unsigned char*, unsigned long);
    int (*read_header)(Decompress*, int);
    int (*start)(Decompress*);
    void (*crop)(Decompress*, unsigned*, unsigned*);
    unsigned (*skip)(Decompress*, unsigned);
    unsigned (*read)(Decompress*, unsigned char**, unsigned);
    int (*finish)(Decompress*);
} jpeg;

struct Errors : ErrorManager {
    jmp_buf out;
};

void give_up(void* common) { longjmp(static_cast<Errors*>(static_cast<Decompress*>(common)->errors)->out, 1); }

// Level -1 is a warning of damage, which libjpeg passes over with wrong pixels; here it is a failure too.
void on_message(void* common, int level) {
    if (level < 0) give_up(common);
}

// An interval of an axis in pixels, with fractions, and the whole pixels that it touches.
struct Interval {
    double low, high;
    int begin, end;
    Interval(double low, double high) : low(low), high(high), begin(std::floor(low)), end(std::ceil(high)) {}
};

// For each output the first of `taps` inputs, and their weights; short filters are filled up with zeros, so that loops
// over taps have one length.
struct Filter {
    std::vector<int> first;
    std::vector<float> weight;
    int taps;
};

double bicubic(double x) {
    x = std::fabs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
    return 0;
}

void make_filter(Filter& f, const Interval& in, int size) {
    const double scale = (in.high - in.low) / size, wide = std::max(scale, 1.0), support = 2 * wide;
    const auto centre = [&](int i) { return in.low + (i + 0.5) * scale; };
    const auto first = [&](int i) { return std::max(in.begin, static_cast<int>(std::floor(centre(i) - support + 0.5))); };
    const auto last = [&](int i) { return std::min(in.end, static_cast<int>(std::floor(centre(i) + support + 0.5))); };
    f.taps = 0;
    for (int i = 0; i < size; ++i) f.taps = std::max(f.taps, last(i) - first(i));
    f.first.resize(size), f.weight.assign(static_cast<size_t>(size) * f.taps, 0);
    for (int i = 0; i < size; ++i) {
        const int start = f.first[i] = std::min(first(i), in.end - f.taps), stop = last(i);
        float* weight = &f.weight[static_cast<size_t>(i) * f.taps];
        float sum = 0;
        for (int k = first(i); k < stop; ++k)
            sum += weight[k - start] = static_cast<float>(bicubic((k - centre(i) + 0.5) / wide));
        for (int k = 0; k < f.taps; ++k) weight[k] /= sum;
    }
}

// Vectors of the compiler, which makes of them what the processor has.
constexpr int LANES = 16, ROWS = 4;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1)));

struct alignas(64) Lanes {
    float values[LANES];
};

Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }

// ROWS rows of the result, before their columns are resized, from `count` rows of `length` values and weights
// (count, ROWS). They become the rows from `member` on of `mixed`, where LANES / VALUES rows lie column by column:
// (columns, rows, VALUES). Several at once, because neighbours are made of nearly the same rows.
template <int VALUES>
void combine_rows(const float* const* rows, const float* weight, int count, int length, int member, float* mixed) {
    for (int i = 0; i < length; i += LANES) {
        Floats a = {}, b = {}, c = {}, d = {};  // by name: an array of them would live in memory
        for (int k = 0; k < count; ++k) {
            const Floats x = load(rows[k] + i);
            a += weight[ROWS * k] * x, b += weight[ROWS * k + 1] * x;
            c += weight[ROWS * k + 2] * x, d += weight[ROWS * k + 3] * x;
        }
        const Floats sums[ROWS] = {a, b, c, d};
        const float* sum = reinterpret_cast<const float*>(sums);
        float* out = mixed + static_cast<size_t>(i) * (LANES / VALUES) + member * VALUES;
        for (int j = 0; j < LANES; j += VALUES, out += LANES)
            for (int m = 0; m < ROWS; ++m) memcpy(out + m * VALUES, sum + m * LANES + j, sizeof(float) * VALUES);
    }
}

// All columns of the rows in `mixed`, whose first column is `begin`, rounded: (width, rows, VALUES).
void combine_columns(const float* mixed, int begin, const Filter& f, int width, uint8_t* out) {
    const float* weight = f.weight.data();
    for (int i = 0; i < width; ++i, weight += f.taps) {
        const float* column = mixed + static_cast<size_t>(LANES) * (f.first[i] - begin);
        Floats a = Floats{} + 0.5f, b = {};
        int k = 0;
        for (; k + 1 < f.taps; k += 2) {
            a += weight[k] * load(column + LANES * k);
            b += weight[k + 1] * load(column + LANES * (k + 1));
        }
        if (k < f.taps) a += weight[k] * load(column + LANES * k);
        a += b;
        a = a < 0.0f ? Floats{} : a;
        a = a > 255.0f ? Floats{} + 255.0f : a;
        reinterpret_cast<Bytes*>(out)[i] = __builtin_convertvector(__builtin_convertvector(a, Ints), Bytes);
    }
}

// `count` of the rows that `combine_columns` made, each by itself: (count, width, channels).
template <int VALUES>
void separate(const uint8_t* __restrict done, int count, int width, bool flip, uint8_t* __restrict out) {
    const int step = flip ? -LANES : LANES;
    if (flip) done += LANES * (width - 1);
    for (int row = 0; row < count; ++row, done += VALUES) {
        if (VALUES == 1) {
            for (int x = 0; x < width; ++x) *out++ = done[step * x];
        } else {  // four bytes at a time; the next pixel overwrites the fourth
            for (int x = 0; x < width - 1; ++x, out += 3) memcpy(out, done + step * x, 4);
            memcpy(out, done + step * (width - 1), 3), out += 3;
        }
    }
}

template <class T>
T* room(std::vector<T>& memory, size_t count) {
    if (memory.size() < count) memory.resize(count);
    return memory.data();
}

// Kept between images: taking memory from the system costs as much as the arithmetic.
struct Scratch {
    Filter rows, columns;
    std::vector<uint8_t> done;
    std::vector<Lanes> row, ring, mixed;
    std::vector<float> weight;
    std::vector<const float*> tap;
};

// The rows of input that ROWS rows of output are made of, at most.
int most_rows(const Filter& f, int size) {
    int most = 0;
    for (int i = 0; i < size; i += ROWS)
        most = std::max(most, f.first[std::min(size, i + ROWS) - 1] + f.taps - f.first[i]);
    return most;
}

// VALUES per pixel: 1 of grey, 4 of RGB and one to spare.
template <int VALUES>
void resize(Decompress& d, Scratch& s, Interval x, Interval y, int height, int width, bool flip, uint8_t* result) {
    constexpr int GROUP = LANES / VALUES;
    // Two columns more on both sides: at the edge of what is decoded, colours are interpolated differently.
    unsigned offset = std::max(0, x.begin - 2), wide = std::min<unsigned>(d.output_width, x.end + 2) - offset;
    jpeg.crop(&d, &offset, &wide);  // moves the left edge to where a block begins
    if (y.begin) jpeg.skip(&d, y.begin);
    make_filter(s.rows, y, height), make_filter(s.columns, x, width);
    const int taps = s.rows.taps, kept = most_rows(s.rows, height), length = (x.end - x.begin) * VALUES;
    const size_t stride = (length + LANES - 1) / LANES;
    // Not at an address that suits vectors: there the decoder writes past the caches, and the row is wanted at once.
    unsigned char* row = reinterpret_cast<unsigned char*>(room(s.row, wide * VALUES / sizeof(Lanes) + 2)) + 8;
    const uint8_t* __restrict needed = row + (x.begin - static_cast<int>(offset)) * VALUES;
    Lanes* ring = room(s.ring, kept * stride);
    float* mixed = room(s.mixed, stride * GROUP)->values;
    uint8_t* done = room(s.done, static_cast<size_t>(LANES) * width);
    const float** tap = room(s.tap, kept);
    float* weight = room(s.weight, ROWS * static_cast<size_t>(kept));
    int have = y.begin;
    for (int i = 0; i < height; i += ROWS) {
        const int made = std::min(ROWS, height - i), first = s.rows.first[i];
        const int count = s.rows.first[i + made - 1] + taps - first;
        for (; have < first + count; ++have) {
            jpeg.read(&d, &row, 1);
            float* __restrict values = ring[(have % kept) * stride].values;
            for (int k = 0; k < length; ++k) values[k] = needed[k];
        }
        for (int k = 0; k < count; ++k) tap[k] = ring[((first + k) % kept) * stride].values;
        std::fill_n(weight, ROWS * count, 0.0f);
        for (int m = 0; m < made; ++m)
            for (int k = 0; k < taps; ++k)
                weight[ROWS * (s.rows.first[i + m] - first + k) + m] = s.rows.weight[static_cast<size_t>(i + m) * taps + k];
        const int member = i % GROUP;
        combine_rows<VALUES>(tap, weight, count, length, member, mixed);
        if (member + ROWS < GROUP && i + ROWS < height) continue;
        combine_columns(mixed, x.begin, s.columns, width, done);
        const size_t start = i - member;
        separate<VALUES>(done, member + made, width, flip, result + start * width * (VALUES == 1 ? 1 : 3));
    }
}

}  // namespace

// status: 1 if the library at `path` has what is needed, else 0.
extern "C" void fcmae_jpeg_bind(const char* path, int64_t* status) {
    *status = 0;
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return;
    bool all = true;
    const auto find = [&](auto& function, const char* name) {
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
        all = all && function;
    };
    find(jpeg.std_error, "jpeg_std_error"), find(jpeg.create, "jpeg_CreateDecompress");
    find(jpeg.destroy, "jpeg_destroy_decompress"), find(jpeg.mem_src, "jpeg_mem_src");
    find(jpeg.read_header, "jpeg_read_header"), find(jpeg.start, "jpeg_start_decompress");
    find(jpeg.crop, "jpeg_crop_scanline"), find(jpeg.skip, "jpeg_skip_scanlines");
    find(jpeg.read, "jpeg_read_scanlines"), find(jpeg.finish, "jpeg_finish_decompress");
    if (!all) return;
    for (const auto& interface : INTERFACES) {
        Decompress d;
        Errors errors;
        d.errors = jpeg.std_error(&errors);
        errors.error_exit = give_up, errors.emit_message = on_message;
        jpeg.version = interface.version, jpeg.size = interface.size;
        if (setjmp(errors.out)) continue;
        jpeg.create(&d, jpeg.version, jpeg.size);
        jpeg.destroy(&d);
        *status = 1;
        return;
    }
}

// box: left, upper, right, lower in pixels of the whole image, which is decoded at 1 / reduction; result: (height,
// width, channels) of 1 or 3 channels. status: 1, or 0 if the decoder found anything wrong.
extern "C" void fcmae_jpeg_crop(const uint8_t* data, int64_t size, const int64_t* box, int64_t reduction,
                                int64_t channels, int64_t height, int64_t width, int64_t flip, uint8_t* result,
                                int64_t* status) {
    static thread_local Scratch scratch;
    Decompress d;
    Errors errors;
    d.errors = jpeg.std_error(&errors);
    errors.error_exit = give_up, errors.emit_message = on_message;
    *status = 0;
    if (setjmp(errors.out)) {
        jpeg.destroy(&d);
        return;
    }
    jpeg.create(&d, jpeg.version, jpeg.size);
    jpeg.mem_src(&d, data, size);
    jpeg.read_header(&d, 1);
    d.scale_numerator = 1, d.scale_denominator = reduction;
    d.out_colourspace = channels == 1 ? GREY : RGBX;
    jpeg.start(&d);
    const double k = reduction;
    const Interval x(box[0] / k, std::min<double>(box[2] / k, d.output_width));
    const Interval y(box[1] / k, std::min<double>(box[3] / k, d.output_height));
    if (x.begin >= x.end || y.begin >= y.end) give_up(&d);
    (channels == 1 ? resize<1> : resize<4>)(d, scratch, x, y, height, width, flip, result);
    if (d.output_row == d.output_height) jpeg.finish(&d);  // damage often shows where the end should be
    jpeg.destroy(&d);
    *status = 1;
}
