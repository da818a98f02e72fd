// experts_hopper.cu against plain loops, without a GPU.
//
//   c++ -O2 -std=c++17 -DSANDERLING_EMULATE -DACT_BF16=1 -I . -I emulator emulator/tests/experts_hopper.cpp
//
// in the folder of the kernels; fails with a message per wrong result.

#include "prelude.cuh"

#include "hopper.cuh"

#include "experts_hopper.cu"

#include <random>

static std::mt19937 generator(1);
static std::vector<bf16> random_values(long long used, long long room) {
    std::uniform_real_distribution<float> values(-1.0f, 1.0f);
    // What no expert uses is NaN.
    std::vector<bf16> all(room, __float2bfloat16_rn(NAN));
    for (long long i = 0; i < used; i++) all[i] = __float2bfloat16_rn(values(generator));
    return all;
}

struct Test {
    std::vector<int> counts; // slots of each expert
    int inputs, outputs, unused;
    long long gap; // elements between the experts' weights
};

// What the kernels are given, by address: emulate_launch hands over words.
struct Call {
    TensorMap left, right;
    const int* starts;
    int experts, inputs, outputs, flags;
    long long stride;
    void* output;
};
static void forward(const Call* call) {
    expert_product_hopper(
        call->left, call->right, call->starts, call->experts, call->inputs, call->outputs, call->output, call->flags);
}
static void input_gradient(const Call* call) {
    expert_product_input_gradient_hopper(
        call->left, call->right, call->starts, call->experts, call->inputs, call->outputs, call->output, call->flags);
}
static void weight_gradient(const Call* call) {
    expert_product_weight_gradient_hopper(
        call->left, call->right, call->starts, call->experts, call->inputs, call->outputs, call->stride,
        (float*)call->output);
}

static TensorMap map_of(const EmulateTensor& tensor) {
    TensorMap map;
    memcpy(map.bytes, &tensor, sizeof(tensor));
    return map;
}

static int failures;

// Runs one product over an output of NaNs.
static void check(const Test& test, HopperProduct product, int flags) {
    const long long inputs = test.inputs, outputs = test.outputs, experts = test.counts.size();
    std::vector<int> starts = {0};
    for (int count : test.counts) starts.push_back(starts.back() + count);
    const long long used = starts.back(), slots = used + test.unused > 0 ? used + test.unused : 1;
    const long long stride = inputs * outputs + test.gap;
    const std::vector<bf16> x = random_values(used * inputs, slots * inputs);
    const std::vector<bf16> dy = random_values(used * outputs, slots * outputs);
    const std::vector<bf16> weights = random_values(experts * stride, experts * stride);
    const bool is_float = product == WEIGHT_GRADIENT || flags & HOPPER_OUTPUT_FLOAT;
    const long long width = product == FORWARD ? outputs : inputs;
    const long long total = product == WEIGHT_GRADIENT ? experts * stride : slots * width;

    std::vector<double> expected(total, NAN);
    std::vector<float> result((total * (is_float ? 4 : 2) + 3) / 4, __uint_as_float(0xffffffffu));
    const auto value = [&](long long i) { return is_float ? result[i] : to_float(((const bf16*)result.data())[i]); };
    if (flags & HOPPER_OUTPUT_ADD)
        for (long long i = 0; i < used * width; i++) {
            const bf16 there = random_values(1, 1)[0];
            if (is_float)
                result[i] = to_float(there);
            else
                ((bf16*)result.data())[i] = there;
        }
    for (int expert = 0; expert < experts; expert++) {
        const bf16* w = weights.data() + expert * stride;
        const int first = starts[expert], end = starts[expert + 1];
        if (product == WEIGHT_GRADIENT) {
            for (int n = 0; n < outputs; n++)
                for (int k = 0; k < inputs; k++) {
                    double sum = 0.0;
                    for (int s = first; s < end; s++)
                        sum += (double)to_float(dy[s * outputs + n]) * to_float(x[s * inputs + k]);
                    expected[expert * stride + n * inputs + k] = sum;
                }
            continue;
        }
        for (int s = first; s < end; s++)
            for (int i = 0; i < width; i++) {
                double sum = flags & HOPPER_OUTPUT_ADD ? value(s * width + i) : 0.0;
                if (product == FORWARD)
                    for (int k = 0; k < inputs; k++)
                        sum += (double)to_float(x[s * inputs + k]) * to_float(w[i * inputs + k]);
                else
                    for (int n = 0; n < outputs; n++)
                        sum += (double)to_float(dy[s * outputs + n]) * to_float(w[n * inputs + i]);
                expected[s * width + i] = sum;
            }
    }

    const TensorMap x_map = map_of({x.data(), {inputs, slots, 1}, {inputs, 0}});
    const TensorMap dy_map = map_of({dy.data(), {outputs, slots, 1}, {outputs, 0}});
    const TensorMap weights_map = map_of({weights.data(), {inputs, outputs, experts}, {inputs, stride}});
    const Call call = {
        product == FORWARD ? x_map : dy_map,
        product == WEIGHT_GRADIENT ? x_map : weights_map,
        starts.data(),
        (int)experts,
        test.inputs,
        test.outputs,
        flags,
        stride,
        result.data()};
    void (*const kernels[])(const Call*) = {forward, input_gradient, weight_gradient};
    // Blocks run one after the other, and take tiles in turn all the same.
    const unsigned blocks[3] = {3, 1, 1}, threads[3] = {HOPPER_THREADS, 1, 1};
    const long long words[24] = {(long long)&call};
    const float floats[8] = {};
    emulate_launch((void*)kernels[product], blocks, threads, 199936, words, floats);

    double difference = 0.0, norm = 0.0;
    bool overrun = false;
    for (long long i = 0; i < total; i++) {
        const float got = value(i);
        if (std::isnan(expected[i])) {
            overrun = overrun || !std::isnan(got);
            continue;
        }
        const double off = std::isnan(got) ? 1e9 : got - expected[i];
        difference += off * off, norm += expected[i] * expected[i];
    }
    const double tolerance = is_float ? 1e-5 : 3e-3;
    if (!overrun && std::sqrt(difference) <= tolerance * std::sqrt(norm)) return;
    failures++;
    fprintf(
        stderr, "product %d, flags %d, %lld experts with %lld slots, %d inputs, %d outputs: off by %g of %g%s\n", product,
        flags, experts, used, test.inputs, test.outputs, std::sqrt(difference), std::sqrt(norm),
        overrun ? ", and what is not its own was written" : "");
}

int main() {
    const Test tests[] = {
        {{128}, 64, 256, 0, 0},
        {{5, 0, 70, 3}, 24, 40, 9, 8},
        {{128, 3}, 320, 264, 0, 0}, // more slices than the ring has
        {{129, 0, 255, 1, 0, 190}, 72, 328, 77, 64},
        {{0, 0, 130, 17, 0}, 136, 264, 3, 0},
        {{0, 0, 0}, 64, 128, 40, 0},
        {std::vector<int>(70, 3), 72, 136, 5, 0},
    };
    for (const Test& test : tests)
        for (HopperProduct product : {FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT}) check(test, product, 0);
    for (int flags = 1; flags < 4; flags++)
        for (HopperProduct product : {FORWARD, INPUT_GRADIENT}) check({{129, 0, 25}, 72, 328, 7, 64}, product, flags);
    return failures != 0;
}
