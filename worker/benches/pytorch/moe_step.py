"""What PyTorch takes for the work of `sanderling bench model --device cuda`.

    python moe_step.py --case e8t2 --batch 8 --quick

`dense` is a Llama-like model of 1B parameters, `e8t2` one of eight experts of which two serve each token, and `layer` the
expert layer alone in the size of Llama 3's 8B. A step is the forward and the backward pass, with the gradient of every
parameter. Each case is measured in several ways, and the fastest is reported, named: weights of bfloat16, or of float32 with
autocast; experts in a loop, or by grouped_mm; what is not a product compiled by torch.compile, layer by layer. There is no
auxiliary loss, which the benchmark of the worker has.

One JSON line per case goes to standard output, and one per way, as soon as it is known, to standard error.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ModuleNotFoundError as missing:
    sys.exit(f"{missing}: this measures PyTorch, which `pip install torch` installs")

# Bytes that stay free beside what is estimated.
RESERVE_BYTES = 3 << 30
GROUPED = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


class Shape:
    def __init__(self, experts, tiny):
        self.experts, self.top_k = experts, 2
        self.d, self.layers, self.heads, self.kv_heads, self.head_dim = 2048, 16, 32, 8, 64
        self.f, self.vocabulary = 4096 if experts else 8192, 32_000
        if tiny:
            self.d, self.layers, self.heads, self.kv_heads, self.head_dim = 64, 2, 4, 2, 16
            self.f, self.vocabulary = 96 if experts else 192, 500

    def forward_flops_per_token(self, length, causal):
        """As `forward_flops_per_token` of the worker: products and attention, a multiply-add as two."""
        out, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        feed_forward = 3 * self.d * self.f
        if self.experts:
            feed_forward = self.experts * self.d + self.top_k * 3 * self.d * self.f
        seen = (length + 1) / 2 if causal else length
        layer = self.d * (out + 2 * kv) + out * self.d + feed_forward + 2 * out * seen
        return 2 * (self.layers * layer + self.d * self.vocabulary)

    def step_bytes_per_token(self):
        """About what a token's activations take until the backward pass."""
        feed_forward = 3 * self.f * 2 * (self.top_k if self.experts else 1) + 4 * self.d * 2
        layer = 2 * 4 * self.d + 4 * 2 * self.d + 4 * self.head_dim * (self.heads + 2 * self.kv_heads) + feed_forward
        return self.layers * layer + self.vocabulary * 8


class Way:
    """How a case is computed."""

    def __init__(self, weights, experts=None, padding=1, compiled=True):
        self.weights, self.experts, self.padding, self.compiled = weights, experts, padding, compiled

    def __str__(self):
        names = {"bf16": "bf16 weights", "autocast": "f32 weights, autocast"}
        experts = {None: [], "grouped": ["grouped_mm"], "looped": ["looped experts"]}[self.experts]
        padded = [f"groups of multiples of {self.padding}"] if self.padding > 1 else []
        return ", ".join([names[self.weights], *experts, *padded, "compiled" if self.compiled else "eager"])


def parameter(*shape):
    return nn.Parameter(torch.empty(*shape))


def rotate(x, cos, sin):
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.heads = (shape.heads, shape.kv_heads, shape.head_dim)
        self.norm = parameter(shape.d)
        self.qkv = parameter((shape.heads + 2 * shape.kv_heads) * shape.head_dim, shape.d)
        self.out = parameter(shape.d, shape.heads * shape.head_dim)

    def forward(self, x, cos, sin):
        (heads, kv_heads, width), (batch, length, d) = self.heads, x.shape
        qkv = F.linear(F.rms_norm(x, (d,), self.norm, 1e-5), self.qkv).view(batch, length, -1, width).transpose(1, 2)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if ATTENTION["repeat"]:
            k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not ATTENTION["repeat"])
        return x + F.linear(seen.transpose(1, 2).reshape(batch, length, heads * width), self.out)


def swiglu(wide):
    gate, up = wide.chunk(2, -1)
    return F.silu(gate) * up


def weighted_swiglu(wide, weights):
    return swiglu(wide) * weights[:, None].to(wide.dtype)


class FeedForward(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.norm = parameter(shape.d)
        self.gate_up, self.down = parameter(2 * shape.f, shape.d), parameter(shape.d, shape.f)

    def forward(self, x):
        normed = F.rms_norm(x, x.shape[-1:], self.norm, 1e-5)
        return x + F.linear(swiglu(F.linear(normed, self.gate_up)), self.down)


class Permute(torch.autograd.Function):
    """Rows to the places of their experts; the gradient is a sum of gathered rows, without atomics."""

    @staticmethod
    def forward(ctx, x, source, place):
        ctx.save_for_backward(place)
        ctx.rows = x.shape[0]
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, gradient):
        (place,) = ctx.saved_tensors
        return gradient.index_select(0, place).view(ctx.rows, -1, gradient.shape[-1]).sum(1), None, None


class Unpermute(torch.autograd.Function):
    """The sum of a token's rows. Places that are nobody's have no gradient."""

    @staticmethod
    def forward(ctx, outputs, source, place, used, rows):
        ctx.save_for_backward(source, used)
        return outputs.index_select(0, place).view(rows, -1, outputs.shape[-1]).sum(1)

    @staticmethod
    def backward(ctx, gradient):
        source, used = ctx.saved_tensors
        gradient = gradient.index_select(0, source)
        return (gradient if used is None else gradient * used[:, None].to(gradient.dtype)), None, None, None, None


def route(logits, top_k, padding):
    """Each choice's place among the rows sorted by expert, each place's token and weight, and where experts end."""
    rows, experts = logits.shape
    best, chosen = logits.float().topk(top_k, -1)
    weights, chosen = best.softmax(-1).flatten(), chosen.flatten()
    counts = (chosen[:, None] == torch.arange(experts, device=chosen.device)).sum(0)
    room = (counts + padding - 1) // padding * padding
    ends = room.cumsum(0)
    order = chosen.argsort(stable=True)
    shift = (ends - room) - (counts.cumsum(0) - counts)
    place = torch.empty_like(order).scatter(0, order, torch.arange(rows * top_k, device=order.device) + shift[chosen[order]])
    places = rows * top_k + (0 if padding == 1 else experts * padding)
    tokens = torch.arange(rows * top_k, device=order.device) // top_k
    source = torch.zeros(places, dtype=order.dtype, device=order.device).scatter(0, place, tokens)
    sorted_weights = torch.zeros(places, device=order.device).scatter(0, place, weights)
    used = None if padding == 1 else torch.zeros(places, device=order.device).scatter(0, place, torch.ones_like(weights))
    return place, source, sorted_weights, used, ends.to(torch.int32), counts


class Experts(nn.Module):
    """From normed tokens and the router's logits to the weighted sum of the experts' outputs."""

    def __init__(self, d, f, experts, top_k, way):
        super().__init__()
        self.top_k, self.padding, self.looped = top_k, way.padding, way.experts == "looped"
        if self.looped:
            self.gate_up = nn.ParameterList([parameter(2 * f, d) for _ in range(experts)])
            self.down = nn.ParameterList([parameter(d, f) for _ in range(experts)])
        else:
            self.gate_up, self.down = parameter(experts, 2 * f, d), parameter(experts, d, f)
        self.route, self.activation = route, weighted_swiglu
        if self.looped and way.compiled:
            self.route = torch.compile(route, dynamic=False)
            self.activation = torch.compile(weighted_swiglu, dynamic=True)

    def forward(self, x, logits):
        place, source, weights, used, ends, counts = self.route(logits, self.top_k, self.padding)
        sorted_rows = Permute.apply(x, source, place)
        if self.looped:
            # The host waits for the sizes here.
            counts = counts.tolist()
            parts = zip(sorted_rows.split(counts), weights.split(counts), self.gate_up, self.down, strict=True)
            outputs = torch.cat([F.linear(self.activation(F.linear(rows, a), w), b) for rows, w, a, b in parts])
        else:
            gate_up, down = (w.to(x.dtype).transpose(-2, -1) for w in (self.gate_up, self.down))
            wide = GROUPED(sorted_rows, gate_up, offs=ends)
            outputs = GROUPED(self.activation(wide, weights), down, offs=ends)
        return Unpermute.apply(outputs, source, place, used, x.shape[0])


class MixtureOfExperts(nn.Module):
    def __init__(self, shape, way):
        super().__init__()
        self.norm, self.router = parameter(shape.d), parameter(shape.experts, shape.d)
        self.experts = Experts(shape.d, shape.f, shape.experts, shape.top_k, way)

    def forward(self, x):
        normed = F.rms_norm(x, x.shape[-1:], self.norm, 1e-5).flatten(0, 1).to(torch.bfloat16)
        return x + self.experts(normed, F.linear(normed, self.router)).view(x.shape)


class Layer(nn.Module):
    def __init__(self, shape, way):
        super().__init__()
        self.attention = Attention(shape)
        self.feed_forward = MixtureOfExperts(shape, way) if shape.experts else FeedForward(shape)

    def forward(self, x, cos, sin):
        return self.feed_forward(self.attention(x, cos, sin))


class Head(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.norm, self.weight = parameter(shape.d), parameter(shape.vocabulary, shape.d)

    def forward(self, x, targets):
        logits = F.linear(F.rms_norm(x, x.shape[-1:], self.norm, 1e-5), self.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Model(nn.Module):
    def __init__(self, shape, way, length):
        super().__init__()
        self.embedding = parameter(shape.vocabulary, shape.d)
        self.layers = nn.ModuleList([Layer(shape, way) for _ in range(shape.layers)])
        self.head = Head(shape)
        # Kept out of the parameters' type.
        frequencies = 500_000.0 ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
        self.tables = (angles.cos(), angles.sin())
        if way.compiled:
            for layer in self.layers:
                (layer.attention if way.experts == "looped" else layer).compile(dynamic=False)
            self.head.compile(dynamic=False)

    def forward(self, tokens, targets):
        x = F.embedding(tokens, self.embedding)
        for layer in self.layers:
            x = layer(x, *self.tables)
        return self.head(x, targets)


def initialise(module, way):
    """Norms are one, the rest normal of deviation 0.02, the same for the same seed and shape of parameters."""
    dtype = torch.bfloat16 if way.weights == "bf16" else torch.float32
    for name, tensor in module.named_parameters():
        with torch.no_grad():
            tensor.data = tensor.data.to(dtype)
            tensor.fill_(1.0) if name.endswith("norm") else tensor.normal_(0.0, 0.02)
    return module


# How attention is computed: chosen once, by time.
ATTENTION = {"backend": "any", "repeat": False}


def choose_attention(shape, batch, length, device):
    """The fastest of the kernels that take the shape."""
    if device.type != "cuda":
        return
    tensors = [
        torch.randn(batch, heads, length, shape.head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    ]
    gradient = torch.randn_like(tensors[0])
    best = None
    for backend in ("cudnn", "flash"):
        for repeat in (False, True):
            set_attention(backend, repeat)
            try:
                def once():
                    q, k, v = tensors
                    if repeat:
                        k, v = (t.repeat_interleave(shape.heads // shape.kv_heads, 1) for t in (k, v))
                    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not repeat)
                    torch.autograd.grad(out, tensors, gradient)

                seconds = measure(once, device, warm_up=2, steps=3)[0]
            except RuntimeError as error:
                note({"attention": backend, "repeated": repeat, "error": first_line(error)})
                continue
            note({"attention": backend, "repeated": repeat, "ms": round(seconds * 1e3, 3)})
            if best is None or seconds < best[0]:
                best = (seconds, backend, repeat)
    if best is None:
        set_attention("any", False)
    else:
        set_attention(best[1], best[2])


def set_attention(backend, repeat):
    torch.backends.cuda.enable_cudnn_sdp(backend in ("cudnn", "any"))
    torch.backends.cuda.enable_flash_sdp(backend in ("flash", "any"))
    torch.backends.cuda.enable_mem_efficient_sdp(backend == "any")
    torch.backends.cuda.enable_math_sdp(backend == "any")
    ATTENTION.update(backend=backend, repeat=repeat)


def note(line):
    print(json.dumps(line), file=sys.stderr, flush=True)


def first_line(error):
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(step, device, warm_up, steps):
    """Median and least seconds of a step."""
    for _ in range(warm_up):
        step()
    seconds = []
    for _ in range(steps):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), min(seconds)


def gradient_norm(parameters):
    norms = torch._foreach_norm([p.grad for p in parameters])
    return torch.stack([n.float() for n in norms]).norm().item()


def free_memory(device):
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def start_batch(shape, way, options, device):
    """The largest batch that is likely to fit, up to the one that is asked for."""
    if device.type != "cuda":
        return options.batch
    feed_forward = 3 * shape.d * shape.f * max(shape.experts, 1)
    attention = 2 * shape.d * shape.head_dim * (shape.heads + shape.kv_heads)
    parameters = shape.layers * (feed_forward + attention) + 2 * shape.d * shape.vocabulary
    model_bytes = parameters * (4 if way.weights == "bf16" else 10)
    free = torch.cuda.mem_get_info(device)[0] - RESERVE_BYTES - model_bytes
    fits = int(free / (shape.step_bytes_per_token() * options.time))
    return max(1, min(options.batch, fits))


def model_once(shape, way, batch, options, device):
    torch.manual_seed(1)
    with device:
        model = initialise(Model(shape, way, options.time), way)
        tokens = torch.randint(shape.vocabulary, (batch, options.time + 1))
    model.tables = tuple(table.to(device) for table in model.tables)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    parameters, loss = list(model.parameters()), None

    def step():
        nonlocal loss
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=way.weights == "autocast"):
            loss = model(inputs, targets)
        loss.backward()

    start = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - start
    median, best = measure(step, device, options.warm_up, options.steps)
    count = batch * options.time
    flops = {causal: 3 * count * shape.forward_flops_per_token(options.time, causal) for causal in (True, False)}
    return {
        "batch": batch,
        "time": options.time,
        "parameters": sum(p.numel() for p in parameters),
        "attention": ATTENTION["backend"] + (", repeated keys" if ATTENTION["repeat"] else ""),
        "loss": loss.item(),
        "gradient_norm": gradient_norm(parameters),
        "first_step_s": round(first, 2),
        "median_ms": median * 1e3,
        "best_ms": best * 1e3,
        "tokens_per_second": count / median,
        "mfu_causal": flops[True] / median / options.peak_tflops / 1e12,
        "mfu_full": flops[False] / median / options.peak_tflops / 1e12,
    }


def measure_model(shape, way, options, device):
    batch = start_batch(shape, way, options, device)
    while True:
        try:
            return model_once(shape, way, batch, options, device)
        except torch.OutOfMemoryError:
            note({"way": str(way), "batch": batch, "error": "out of memory"})
            if batch == 1:
                raise
        # Outside of the handler, where the error does not hold the tensors any more.
        batch -= max(1, batch // 5)
        free_memory(device)


def measure_layer(way, options, device):
    d, f, experts, top_k = (64, 96, 8, 2) if options.tiny else (4096, 14_336, 8, 2)
    rows = options.tokens
    torch.manual_seed(1)
    with device:
        layer = initialise(Experts(d, f, experts, top_k, way), way)
        x = torch.randn(rows, d, dtype=torch.bfloat16, requires_grad=True)
        logits = torch.randn(rows, experts, requires_grad=True)
        gradient = torch.randn(rows, d, dtype=torch.bfloat16)
    if way.compiled and way.experts != "looped":
        layer.compile(dynamic=False)
    parameters = [*layer.parameters(), x, logits]

    def step():
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=way.weights == "autocast"):
            y = layer(x, logits)
        y.backward(gradient)

    start = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - start
    median, best = measure(step, device, options.warm_up, options.steps)
    flops = 3 * 2 * rows * top_k * 3 * d * f
    return {
        "tokens": rows,
        "gradient_norm": gradient_norm(parameters),
        "first_step_s": round(first, 2),
        "median_ms": median * 1e3,
        "best_ms": best * 1e3,
        "tflops": flops / median / 1e12,
        "mfu": flops / median / options.peak_tflops / 1e12,
    }


def ways_of(case, options):
    """From the one that is likely to be the fastest on; the rest only while there is time."""
    if case == "dense":
        return [Way("bf16"), Way("autocast")]
    ways = [Way("bf16", "grouped"), Way("bf16", "looped"), Way("autocast", "grouped"), Way("autocast", "looped")]
    if GROUPED is None:
        ways = [way for way in ways if way.experts == "looped"]
    return ways if case == "e8t2" else ways[: 2 if options.quick else 4]


def run(case, way, options, device):
    start, failed = time.perf_counter(), None
    try:
        if case == "layer":
            measured = measure_layer(way, options, device)
        else:
            measured = measure_model(Shape(8 if case == "e8t2" else 0, options.tiny), way, options, device)
    # Whatever a way fails of, the others are measured.
    except Exception as error:  # noqa: BLE001
        failed = first_line(error)
    if failed is not None:
        measured = {"error": failed}
    if device.type == "cuda":
        measured["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    free_memory(device)
    measured = {"way": str(way), **measured, "seconds": round(time.perf_counter() - start, 1)}
    note({"case": case, **measured})
    return measured


def fallbacks(case, way):
    """What is tried in the place of a way that failed, one after the other."""
    if case != "layer":
        chosen = dict(ATTENTION)
        set_attention("any", False)
        yield way
        # It was not the attention.
        set_attention(*chosen.values())
    if way.experts == "grouped":
        yield Way(way.weights, "grouped", padding=16)
    elif way.compiled:
        yield Way(way.weights, way.experts, compiled=False)


def agree(results):
    """Whether all ways came to about the same gradient, for a wrong kernel may be a fast one."""
    norms = {}
    for r in results:
        if "gradient_norm" in r:
            norms.setdefault(r.get("batch"), []).append(r["gradient_norm"])
    return all(all(map(math.isfinite, same)) and max(same) <= 1.2 * min(same) for same in norms.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", action="append", choices=["dense", "e8t2", "layer"], help="all if none is given")
    parser.add_argument("--batch", type=int, default=16, help="the most sequences of a step; fewer if they do not fit")
    parser.add_argument("--time", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of the layer alone")
    parser.add_argument("--peak-tflops", type=float, default=989.4, help="what MFU is a share of")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="few steps, and no new way after 75 seconds")
    parser.add_argument("--budget-s", type=float, help="no new way after so many seconds")
    parser.add_argument("--tiny", action="store_true", help="sizes to try the program with, on a CPU")
    options = parser.parse_args()
    options.warm_up, options.steps = (1, 3) if options.quick else (3, 8)
    if options.tiny:
        options.time, options.tokens, options.batch = 64, 128, min(options.batch, 2)
    budget = options.budget_s or (75.0 if options.quick else float("inf"))
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("high")
    # One compilation for each shape, for the shapes do not change.
    torch._dynamo.config.automatic_dynamic_shapes = False
    start = time.perf_counter()
    cases = options.case or ["e8t2", "layer", "dense"]
    if cases != ["layer"]:
        choose_attention(Shape(0, options.tiny), 1 if options.tiny else 4, options.time, device)
    results = {case: [] for case in cases}
    ways = {case: ways_of(case, options) for case in cases}
    # The likely fastest way of every case comes first, so that an early end leaves one of each.
    for turn in range(max(map(len, ways.values()))):
        for case in cases:
            if turn >= len(ways[case]):
                continue
            way = ways[case][turn]
            if time.perf_counter() - start > budget:
                results[case].append({"way": str(way), "error": "not measured: the time is up"})
                continue
            results[case].append(run(case, way, options, device))
            for other in fallbacks(case, way) if "error" in results[case][-1] else ():
                if time.perf_counter() - start > budget:
                    break
                results[case].append(run(case, other, options, device))
                if "error" not in results[case][-1]:
                    break
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    for case in cases:
        measured = [r for r in results[case] if "median_ms" in r and math.isfinite(r["gradient_norm"])]
        # By tokens, for batches may differ.
        best = max(measured, key=lambda r: r.get("tokens_per_second") or r["tflops"], default={"error": "no way was measured"})
        line = {"config": case, "device": name, "torch": torch.__version__, "peak_tflops": options.peak_tflops}
        print(json.dumps({**line, **best, "ways_agree": agree(results[case]), "ways": results[case]}), flush=True)


if __name__ == "__main__":
    main()
