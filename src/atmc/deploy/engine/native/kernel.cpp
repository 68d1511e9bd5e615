// Runs a program of `../program.py`: a network's inference, operation by operation, in one block of memory.
//
// An activation has one stream per channel: all images of the batch one after the other, row by row from the top, with
// columns and rows of zeros between them that are the padding of both neighbors. So a convolution of stride 1 adds, for
// every nonzero weight, a shifted copy of a whole input stream to an output stream. Sums at positions of padding are
// masked to zero. The program is trusted: `program.py` computes every offset, and this file checks none.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

struct Nonzero {
    float weight;
    int32_t offset;  // in floats, relative to the position that is computed
};

// The same fields as `OP` of program.py. Lengths and offsets are in floats, `vectors` in units of 16 floats.
struct Op {
    int64_t kind, in, other, out, lead, channels, in_stride, out_stride, vectors, mask, rows, bias;
    int64_t batch, height, width, row, image, out_height, out_width, out_row, out_image;
    int64_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, count_padding;
    double low, high;
};

struct Memory {
    float *arena;
    const Nonzero *nonzeros;
    const int32_t *starts;
    const float *floats;
    const int32_t *masks;
    const float *images;
    float *logits;
};

enum Kind { PACK, CONVOLVE, CONVOLVE_FOURS, DOT, PHASES, ELEMENTWISE, MAX_POOL, MEAN_POOL, FLATTEN, UNPACK };

#if defined(__x86_64__) || defined(_M_X64)
#define LANES 16
#define MAX_REGISTERS 8
#define MAX_FOURS 6
#define SUFFIX avx512
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#include "lanes.inc"
#undef LANES
#undef MAX_REGISTERS
#undef MAX_FOURS
#undef SUFFIX
#undef TARGET
#define LANES 8
#define MAX_REGISTERS 10
#define MAX_FOURS 2
#define SUFFIX avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "lanes.inc"
#undef LANES
#undef MAX_REGISTERS
#undef MAX_FOURS
#undef SUFFIX
#undef TARGET
#endif
#define LANES 4
#define MAX_REGISTERS 10
#define MAX_FOURS 2
#define SUFFIX portable
#define TARGET
#include "lanes.inc"

struct Instructions {
    const char *name;
    int64_t (*blocks)(const Op &);
    void (*convolve_block)(const Op &, const Memory &, int64_t, int64_t, int64_t);
    void (*elementwise)(const Op &, const Memory &, int64_t, int64_t);
    void (*max_pairs)(const Op &, const float *, float *, int64_t);
    void (*every_second)(const Op &, const float *, float *, int64_t, int64_t, int64_t);
    float (*sum)(const float *, int64_t);
};

static const Instructions SETS[] = {
#if defined(__x86_64__) || defined(_M_X64)
    {"avx512", avx512::blocks, avx512::convolve_block, avx512::elementwise, avx512::max_pairs, avx512::every_second, avx512::sum},
    {"avx2", avx2::blocks, avx2::convolve_block, avx2::elementwise, avx2::max_pairs, avx2::every_second, avx2::sum},
#endif
    {"portable", portable::blocks, portable::convolve_block, portable::elementwise, portable::max_pairs, portable::every_second, portable::sum},
};

static bool runs_here(const char *name) {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_cpu_init();
    if (!std::strcmp(name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (!std::strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return !std::strcmp(name, "portable");
}

static inline float clamp(const Op &op, float x) {
    x = x > (float)op.low ? x : (float)op.low;
    return x < (float)op.high ? x : (float)op.high;
}

static inline void zero_lead(const Op &op, const Memory &m, int64_t first) {
    if (first == 0) std::memset(m.arena + op.out - op.lead, 0, op.lead * sizeof(float));
}

// Sets each channel's stream to zero after the vectors that an operation computes, for one group of channels.
static inline void zero_tails(const Op &op, const Memory &m, int64_t group, int64_t groups) {
    const int64_t first = op.channels * group / groups, last = op.channels * (group + 1) / groups;
    for (int64_t channel = first; channel < last; channel++) {
        float *out = m.arena + op.out + channel * op.out_stride;
        std::memset(out + op.vectors * 16, 0, (op.out_stride - op.vectors * 16) * sizeof(float));
    }
}

// Copies images (n, c, h, w) into streams, multiplied by scale plus shift.
static void pack(const Op &op, const Memory &m, int64_t first, int64_t last) {
    for (int64_t channel = first; channel < last; channel++) {
        const float scale = m.floats[op.bias + 2 * channel], shift = m.floats[op.bias + 2 * channel + 1];
        float *out = m.arena + op.out + channel * op.out_stride;
        std::memset(out, 0, op.out_stride * sizeof(float));
        for (int64_t n = 0; n < op.batch; n++) {
            const float *in = m.images + (n * op.channels + channel) * op.height * op.width;
            for (int64_t y = 0; y < op.height; y++)
                for (int64_t x = 0; x < op.width; x++)
                    out[n * op.out_image + y * op.out_row + x] = in[y * op.width + x] * scale + shift;
        }
    }
}

// Computes a linear layer for one image: its features are contiguous in memory.
static void dot(const Op &op, const Memory &m, int64_t first, int64_t last) {
    const float *in = m.arena + op.in;
    for (int64_t channel = first; channel < last; channel++) {
        const Nonzero *at = m.nonzeros + m.starts[op.rows + channel];
        const Nonzero *const end = m.nonzeros + m.starts[op.rows + channel + 1];
        float sums[4] = {0, 0, 0, 0};
        for (; at + 4 <= end; at += 4)
            for (int u = 0; u < 4; u++) sums[u] += at[u].weight * in[at[u].offset];
        for (; at < end; at++) sums[0] += at->weight * in[at->offset];
        float sum = m.floats[op.bias + channel] + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
        if (op.other >= 0) sum += m.arena[op.other + channel];
        m.arena[op.out + channel] = clamp(op, sum);
    }
}

// Copies one phase of each input channel: every stride_y-th row from pad_y on, and stride_x-th column from pad_x on.
// The output channel is input channel * number of phases + phase; the field mask is the phase, kernel_y their number.
static void phases(const Op &op, const Memory &m, const Instructions &set, int64_t first, int64_t last) {
    const int64_t rows = (op.height - op.pad_y + op.stride_y - 1) / op.stride_y;
    const int64_t count = (op.width - op.pad_x + op.stride_x - 1) / op.stride_x;
    for (int64_t channel = first; channel < last; channel++) {
        const float *in = m.arena + op.in + channel * op.in_stride + op.pad_y * op.row + op.pad_x;
        float *const out = m.arena + op.out + (channel * op.kernel_y + op.mask) * op.out_stride;
        float *const end = out + op.out_stride;
        std::memset(out, 0, op.out_stride * sizeof(float));
        for (int64_t n = 0; n < op.batch; n++) {
            const float *from = in + n * op.image;
            float *to = out + n * op.out_image;
            if (op.stride_y == 2 && op.stride_x == 2) {
                set.every_second(op, from, to, rows, count, end - to);
                continue;
            }
            for (int64_t y = 0; y < rows; y++)
                for (int64_t x = 0; x < count; x++)
                    to[y * op.out_row + x] = from[y * op.stride_y * op.row + x * op.stride_x];
        }
    }
}

// Returns the maximum or mean of the pixels of a window that lie in the image; (top, left) is its first pixel.
static float window(const Op &op, const float *in, int64_t top, int64_t left) {
    float best = -std::numeric_limits<float>::infinity(), total = 0;
    int64_t count = 0;
    for (int64_t ky = 0; ky < op.kernel_y; ky++) {
        const int64_t y = top + ky * op.dilation_y;
        if (y < 0 || y >= op.height) continue;
        for (int64_t kx = 0; kx < op.kernel_x; kx++) {
            const int64_t x = left + kx * op.dilation_x;
            if (x < 0 || x >= op.width) continue;
            best = std::max(best, in[y * op.row + x]);
            total += in[y * op.row + x];
            count++;
        }
    }
    if (op.kind == MAX_POOL) return best;
    if (op.count_padding) {
        const int64_t down = std::min(top + op.kernel_y, op.height + op.pad_y) - top;
        const int64_t across = std::min(left + op.kernel_x, op.width + op.pad_x) - left;
        count = down * across;
    }
    return total / (float)count;
}

// Whether a pooling is a maximum over 2 x 2 pixels, stride 2, with all windows inside the image.
static bool is_max_of_pairs(const Op &op) {
    return op.kind == MAX_POOL && op.kernel_y == 2 && op.kernel_x == 2 && op.stride_y == 2 && op.stride_x == 2 &&
           op.dilation_y == 1 && op.dilation_x == 1 && op.pad_y == 0 && op.pad_x == 0 &&
           2 * op.out_height <= op.height && 2 * op.out_width <= op.width;
}

// Whether a pooling is the mean of all pixels.
static bool is_global_mean(const Op &op) {
    return op.kind == MEAN_POOL && op.kernel_y == op.height && op.kernel_x == op.width && op.out_height == 1 &&
           op.out_width == 1 && op.pad_y == 0 && op.pad_x == 0;
}

static void pool(const Op &op, const Memory &m, const Instructions &set, int64_t first, int64_t last) {
    const bool pairs = is_max_of_pairs(op), all = is_global_mean(op);
    for (int64_t channel = first; channel < last; channel++) {
        float *const out = m.arena + op.out + channel * op.out_stride, *const end = out + op.out_stride;
        std::memset(out, 0, op.out_stride * sizeof(float));
        for (int64_t n = 0; n < op.batch; n++) {
            const float *in = m.arena + op.in + channel * op.in_stride + n * op.image;
            float *to = out + n * op.out_image;
            if (all) {  // the padding between the rows is zero
                *to = clamp(op, set.sum(in, (op.height - 1) * op.row + op.width) / (float)(op.height * op.width));
                continue;
            }
            if (pairs) {
                set.max_pairs(op, in, to, end - to);
                continue;
            }
            for (int64_t y = 0; y < op.out_height; y++, to += op.out_row)
                for (int64_t x = 0; x < op.out_width; x++)
                    to[x] = clamp(op, window(op, in, y * op.stride_y - op.pad_y, x * op.stride_x - op.pad_x));
        }
    }
}

// Copies streams to features: feature (channel, y, x) of image n goes to ((channel h + y) w + x) * out_stride + n.
static void flatten(const Op &op, const Memory &m, int64_t first, int64_t last) {
    for (int64_t channel = first; channel < last; channel++) {
        const float *in = m.arena + op.in + channel * op.in_stride;
        float *out = m.arena + op.out + channel * op.height * op.width * op.out_stride;
        for (int64_t y = 0; y < op.height; y++)
            for (int64_t x = 0; x < op.width; x++, out += op.out_stride) {
                if (op.out_stride == 1) {
                    *out = in[y * op.row + x];
                    continue;
                }
                for (int64_t n = 0; n < op.batch; n++) out[n] = in[n * op.image + y * op.row + x];
                for (int64_t n = op.batch; n < op.out_stride; n++) out[n] = 0;
            }
    }
}

static void unpack(const Op &op, const Memory &m) {
    for (int64_t n = 0; n < op.batch; n++)
        for (int64_t f = 0; f < op.channels; f++) m.logits[n * op.channels + f] = m.arena[op.in + f * op.in_stride + n];
}

// How the work of an operation is divided: into blocks of positions times groups of channels.
struct Cut {
    int64_t blocks, groups;
};

static Cut cut(const Op &op, const Instructions &set, int64_t threads) {
    if (op.kind == UNPACK) return {1, 1};
    const int64_t units = op.kind == CONVOLVE_FOURS ? (op.channels + 3) / 4 : op.channels;
    const bool stream = op.kind == CONVOLVE || op.kind == CONVOLVE_FOURS;
    const int64_t blocks = stream ? set.blocks(op) : 1, parts = threads == 1 ? 1 : 2 * threads;
    return {blocks, std::min(units, (parts + blocks - 1) / blocks)};
}

static void run_part(const Op &op, const Memory &m, const Instructions &set, const Cut &cut, int64_t part) {
    const int64_t block = part / cut.groups, group = part % cut.groups;
    const int64_t units = op.kind == CONVOLVE_FOURS ? (op.channels + 3) / 4 : op.channels;
    const int64_t first = units * group / cut.groups, last = units * (group + 1) / cut.groups;
    if (block == 0) zero_lead(op, m, first);
    switch (op.kind) {
        case PACK: return pack(op, m, first, last);
        case CONVOLVE:
        case CONVOLVE_FOURS:
            if (block == 0) zero_tails(op, m, group, cut.groups);
            return set.convolve_block(op, m, block, first, last);
        case DOT: return dot(op, m, first, last);
        case PHASES: return phases(op, m, set, first, last);
        case ELEMENTWISE: zero_tails(op, m, group, cut.groups); return set.elementwise(op, m, first, last);
        case MAX_POOL:
        case MEAN_POOL: return pool(op, m, set, first, last);
        case FLATTEN: return flatten(op, m, first, last);
        default: return unpack(op, m);
    }
}

// Threads that run one program together. Every operation is divided into parts, numbered through the program; a thread
// that is free takes the next one, and runs it when all parts of the operations before it are done. Nothing waits for a
// thread as such: one that the system does not schedule delays the others only if it has taken a part.
struct ThreadGroup {
    explicit ThreadGroup(int64_t threads) : threads(threads) {
        try {
            for (int64_t i = 1; i < threads; i++) members.emplace_back([this] { work(); });
        } catch (...) {
            stop();
            throw;
        }
    }

    ~ThreadGroup() { stop(); }

    void run(const Op *program, int64_t length, const Memory &memory, const Instructions &set) {
        while (busy.load() != 0) pause();
        ops = program, m = memory, instructions = &set;
        ends.assign(1, 0);
        for (int64_t i = 0; i < length; i++) {
            const Cut parts = cut(ops[i], set, threads);
            ends.push_back(ends.back() + parts.blocks * parts.groups);
        }
        next.store(0);
        done.store(0);
        if (threads > 1) {
            open.store(true);
            started.fetch_add(1);
            started.notify_all();
        }
        take_parts();
        wait_for(ends.back());
        open.store(false);
    }

  private:
    void stop() {
        stopped.store(true);
        started.fetch_add(1);
        started.notify_all();
        for (std::thread &member : members) member.join();
    }

    void work() {
        for (uint64_t seen = 0;;) {
            for (int i = 0; i < 20000 && started.load() == seen; i++) pause();
            started.wait(seen);
            seen = started.load();
            if (stopped.load()) return;
            busy.fetch_add(1);  // from here on the next run waits before it changes the program
            if (open.load()) take_parts();
            busy.fetch_sub(1);
        }
    }

    void take_parts() {
        const int64_t all = ends.back();
        int64_t i = 0;
        for (int64_t part; (part = next.fetch_add(1)) < all; done.fetch_add(1)) {
            while (part >= ends[i + 1]) i++;
            wait_for(ends[i]);
            run_part(ops[i], m, *instructions, cut(ops[i], *instructions, threads), part - ends[i]);
        }
    }

    void wait_for(int64_t parts) {
        for (int spins = 0; done.load() < parts; spins++)
            if (spins < 4000)
                pause();
            else
                std::this_thread::yield();
    }

    static inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
        __builtin_ia32_pause();
#endif
    }

    const int64_t threads;
    std::vector<std::thread> members;
    const Op *ops = nullptr;
    Memory m{};
    const Instructions *instructions = nullptr;
    std::vector<int64_t> ends;  // number of parts before each operation, and of all
    std::atomic<int64_t> next{0}, done{0}, busy{0};  // parts taken, parts done, members at work
    std::atomic<uint64_t> started{0};
    std::atomic<bool> open{false}, stopped{false};
};

extern "C" {

int64_t atmc_op_size() { return sizeof(Op); }

// Returns the name of an instruction set that this machine runs, the fastest first; nullptr after the last.
const char *atmc_instructions(int64_t index) {
    for (const Instructions &set : SETS)
        if (runs_here(set.name) && index-- == 0) return set.name;
    return nullptr;
}

// Starts threads; nullptr if they cannot be started.
void *atmc_start_threads(int64_t threads) {
    try {
        return new ThreadGroup(threads);
    } catch (...) {
        return nullptr;
    }
}

void atmc_stop_threads(void *group) { delete static_cast<ThreadGroup *>(group); }

// Runs a program with the instruction set of that name. Returns 0, or 1 if there is no such set.
int64_t atmc_run(void *group, const char *set, const Op *ops, int64_t count, float *arena, const Nonzero *nonzeros,
                 const int32_t *starts, const float *floats, const int32_t *masks, const float *images, float *logits) {
    const Memory m = {arena, nonzeros, starts, floats, masks, images, logits};
    for (const Instructions &candidate : SETS)
        if (!std::strcmp(candidate.name, set) && runs_here(set)) {
            static_cast<ThreadGroup *>(group)->run(ops, count, m, candidate);
            return 0;
        }
    return 1;
}
}
