#!/usr/bin/env python3
"""Compares Sanderling with Hugging Face's transformers, in both directions, for Llama, Mixtral and Qwen2-MoE.

    python3 experiments/parity.py            # from the root of the repository

Makes a virtual environment under target/ and installs torch and transformers into it (several gigabytes, once), builds
the release binaries, and then

* lets transformers make random models (grouped-query attention, tied and untied, Llama 3's rotary scaling, float32 and
  bfloat16, one file and shards, a real shared expert), and compares what Sanderling computes from their files;
* upcycles such a Llama with `sanderling upcycle`, trains with `sanderling train` and writes with `sanderling export`, and
  compares what transformers computes from those files, tokenizer included.

Prints a line per comparison and exits with 1 if one deviates by more than the tolerance.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / "target" / "parity-venv"
PACKAGES = ["torch==2.*", "transformers>=5,<6", "safetensors", "numpy"]
LOGITS_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5


def inside_environment():
    """Goes on in the virtual environment, which is made first if need be."""
    python = ENVIRONMENT / "bin" / "python"
    if pathlib.Path(sys.prefix) == ENVIRONMENT:
        return
    marker = ENVIRONMENT / "complete"
    if not marker.exists():
        print(f"making {ENVIRONMENT.relative_to(ROOT)} (several gigabytes) ...", flush=True)
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        marker.touch()
    os.execv(python, [str(python), __file__, *sys.argv[1:]])


def run(*arguments):
    """Runs a program of the repository and returns what it prints."""
    done = subprocess.run([str(argument) for argument in arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, arguments))} failed: {done.stderr.strip()}")
    return done.stdout


def build():
    run("cargo", "build", "--release", "--locked", "--bin", "sanderling", "--example", "logits")


def sanderling(*arguments):
    return run(ROOT / "target" / "release" / "sanderling", *arguments)


class Comparison:
    def __init__(self):
        self.failed = 0

    def check(self, what, directory):
        """Logits and loss of a checkpoint by both implementations."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        vocabulary, context = model.config.vocab_size, model.config.max_position_embeddings
        generator = torch.Generator().manual_seed(11)
        ids = torch.randint(vocabulary, (3, min(context, 40)), generator=generator)
        with torch.no_grad():
            theirs = model(input_ids=ids, labels=ids)
        ours = json.loads(run(ROOT / "target/release/examples/logits", directory, json.dumps(ids.tolist())))
        logits = torch.tensor(ours["logits"]).reshape(theirs.logits.shape)
        logits = (logits - theirs.logits).abs().max().item()
        loss = abs(ours["loss"] - theirs.loss.item())
        scale = theirs.logits.abs().max().item()
        good = logits <= LOGITS_TOLERANCE and loss <= LOSS_TOLERANCE
        self.failed += not good
        print(
            f"{'ok  ' if good else 'FAIL'} {what:58} {type(model).__name__:22} logits {logits:.1e} (of {scale:.1f}), "
            f"loss {loss:.1e}",
            flush=True,
        )

    def check_tokenizer(self, directory):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory)
        text = "First Citizen:\nBefore we proceed any further, hear me speak.\n"
        ids = tokenizer(text)["input_ids"]
        good = tokenizer.decode(ids) == text and len(ids) == len(text)
        self.failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {'the tokenizer of a run':58} {type(tokenizer).__name__}", flush=True)


def common_settings():
    return dict(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def random_models():
    """Name, model, and how it is saved."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
    )

    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    torch.manual_seed(5)
    llama = dict(common_settings(), intermediate_size=80)
    mixtral = dict(common_settings(), intermediate_size=56, num_local_experts=6, num_experts_per_tok=2)
    qwen = dict(
        common_settings(),
        intermediate_size=80,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=10,
        num_experts_per_tok=3,
    )
    yield "Llama", LlamaForCausalLM(LlamaConfig(**llama)), {}
    yield "Llama, tied, Llama 3 rotary scaling", LlamaForCausalLM(
        LlamaConfig(**llama, tie_word_embeddings=True, rope_parameters=llama3)
    ), {}
    yield "Llama, bfloat16, in shards", LlamaForCausalLM(LlamaConfig(**llama)).to(torch.bfloat16), {
        "max_shard_size": "60KB"
    }
    yield "Llama, float16", LlamaForCausalLM(LlamaConfig(**llama)).to(torch.float16), {}
    yield "Mixtral", MixtralForCausalLM(MixtralConfig(**mixtral)), {}
    yield "Mixtral, bfloat16, in shards", MixtralForCausalLM(MixtralConfig(**mixtral)).to(torch.bfloat16), {
        "max_shard_size": "100KB"
    }
    yield "Qwen2-MoE with its shared expert", with_biases(Qwen2MoeForCausalLM(Qwen2MoeConfig(**qwen))), {}
    yield "Qwen2-MoE, renormalised", with_biases(
        Qwen2MoeForCausalLM(Qwen2MoeConfig(**qwen, norm_topk_prob=True))
    ), {}


def with_biases(model):
    """Biases are initialised to zero, which would hide them."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0.0, 0.3)
    return model


def from_transformers(comparison, folder):
    for name, model, options in random_models():
        directory = folder / name.replace(" ", "-").replace(",", "")
        model.save_pretrained(directory, **options)
        comparison.check(f"{name}: written by transformers", directory)
    return folder / "Llama"


def from_sanderling(comparison, folder, dense):
    recipes = [
        ("8 experts, top-2, topk-then-softmax", []),
        ("8 experts, top-4, granularity 2, exact", ["--top-k", 4, "--granularity", 2]),
        ("8 experts, top-2, softmax-then-topk, paper", ["--router", "softmax-then-topk", "--scaling", "paper"]),
        ("8 experts, top-2, in shards", ["--shard-bytes", 200_000]),
    ]
    for number, (name, options) in enumerate(recipes):
        directory = folder / f"upcycled-{number}"
        sanderling("upcycle", "--dense", dense, "--out", directory, *options)
        comparison.check(f"upcycled to {name}", directory)

    small = ["--hidden-size", 32, "--layers", 2, "--heads", 4, "--context", 64, "--workers", 2]
    short = ["--steps", 40, "--eval-every", 20, "--runs-dir", folder / "runs"]
    runs = [
        ("dense", ["--experts", 1, "--top-k", 1]),
        ("topk-then-softmax", []),
        ("softmax-then-topk", ["--router", "softmax-then-topk"]),
    ]
    for name, options in runs:
        sanderling("train", "--name", name, *small, *short, *options)
        directory = folder / f"exported-{name}"
        sanderling("export", "--run", folder / "runs" / name, "--out", directory)
        comparison.check(f"trained {name} and exported", directory)
    comparison.check_tokenizer(directory)


def main():
    inside_environment()
    import torch
    import transformers

    print(f"torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    build()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="sanderling-parity-"))
    try:
        comparison = Comparison()
        dense = from_transformers(comparison, folder)
        from_sanderling(comparison, folder, dense)
    finally:
        shutil.rmtree(folder)
    if comparison.failed:
        sys.exit(f"{comparison.failed} comparisons deviate by more than {LOGITS_TOLERANCE} (logits), {LOSS_TOLERANCE} (loss)")
    print("all agree")


if __name__ == "__main__":
    main()
