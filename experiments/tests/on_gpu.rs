//! A GPU, emulated by a C++ compiler and real where there is one, evaluates and generates like the CPU.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../worker/tests/skip/mod.rs"]
mod skip;

use std::ops::ControlFlow;

use sanderling::evaluation::{CHOICES, Question, Scoring, Windows, answer_all, language_loss};
use sanderling::generate::{Generator, Sampling};
use sanderling_common::init::initial_parameters;
use sanderling_common::model_config::{FeedForward, ModelConfig, RouterOrder};
use sanderling_common::tokenizer::{TRAINED_VOCABULARY_MIN, Tokenizer};
use sanderling_common::tokens::Tokens;
use sanderling_worker::kernels::Kernels;
use sanderling_worker::kernels::cpu::Cpu;
use sanderling_worker::kernels::cuda::{Buffer, Cuda, CudaError, Precision};

const VOCABULARY: usize = 17;

fn config() -> ModelConfig {
    config_of(VOCABULARY, 12)
}

/// A mixture of experts that is next to nothing.
fn config_of(vocab_size: usize, context: usize) -> ModelConfig {
    ModelConfig {
        vocab_size,
        hidden_size: 16,
        layers: 2,
        heads: 2,
        kv_heads: 1,
        head_dim: 8,
        intermediate_size: 24,
        feed_forward: FeedForward::Moe { experts: 4, top_k: 2, router: RouterOrder::TopkThenSoftmax },
        shared_expert: None,
        qkv_bias: false,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_llama3: None,
        tie_word_embeddings: false,
        context,
    }
}

/// Weights so large that the likeliest token changes from place to place.
fn parameters(config: &ModelConfig) -> Vec<f32> {
    let drawn = initial_parameters(config, 3).unwrap();
    drawn.iter().map(|&value| if value == 1.0 { 1.0 } else { value * 20.0 }).collect()
}

fn on_device(cuda: &mut Cuda, config: &ModelConfig) -> Box<Buffer> {
    let parameters = parameters(config);
    let mut held = cuda.allocate_factors(parameters.len()).unwrap();
    cuda.upload(&parameters, &mut held);
    held
}

fn loss<K: Kernels>(parameters: &K::Buffer, kernels: &(dyn Fn() -> K + Sync)) -> f64
where
    K::Buffer: Sync,
{
    let text: Vec<u32> = (0..95u32).map(|place| (place * place + place / 3) % VOCABULARY as u32).collect();
    let (config, tokens) = (config(), Tokens::collect(text, VOCABULARY));
    let scoring = Scoring { config: &config, parameters, kernels, threads: 2 };
    let windows = Windows { length: 12, stride: 8, batch: 3 };
    let score = language_loss(&scoring, &tokens, &windows, &mut |_, _| ControlFlow::Continue(())).unwrap();
    assert_eq!(score.tokens, 94);
    score.loss()
}

fn evaluates_like_the_cpu(open: impl Fn(Precision) -> Result<Cuda, CudaError>) {
    let expected = loss(parameters(&config()).as_slice(), &Cpu::default);
    for (precision, tolerance) in [(Precision::F32, 1e-4), (Precision::Bf16, 2e-2)] {
        let Some(mut cuda) = skip::kernels(open(precision)) else { return };
        let held = on_device(&mut cuda, &config());
        let found = loss(&*held, &|| cuda.beside());
        assert!((found / expected - 1.0).abs() < tolerance, "{precision}: {found} and {expected}");
    }
}

/// The likeliest tokens, of more than the context holds.
fn generates_like_the_cpu(open: impl Fn(Precision) -> Result<Cuda, CudaError>) {
    const COUNT: usize = 20;
    let sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 1 };
    let (config, prompt) = (config(), [3, 1, 4, 1, 5]);
    let parameters = parameters(&config);
    let expected = Generator::new(&config, &parameters).unwrap().generate(&prompt, &sampling, COUNT).unwrap();
    let mut distinct = expected.clone();
    distinct.sort_unstable();
    distinct.dedup();
    assert!(distinct.len() > 3, "{expected:?} would agree with anything");
    let Some(mut cuda) = skip::kernels(open(Precision::F32)) else { return };
    let held = on_device(&mut cuda, &config);
    let mut generator = Generator::with(cuda.beside(), &config, &*held).unwrap();
    assert_eq!(generator.generate(&prompt, &sampling, COUNT).unwrap(), expected);
}

/// How many of these questions are answered rightly.
fn right<K: Kernels>(
    (config, tokenizer): (&ModelConfig, &Tokenizer),
    questions: &[Question],
    parameters: &K::Buffer,
    kernels: &(dyn Fn() -> K + Sync),
) -> usize
where
    K::Buffer: Sync,
{
    let scoring = Scoring { config, parameters, kernels, threads: 1 };
    let asked = ("birds", questions);
    answer_all(&scoring, asked, tokenizer, 8, &mut |_| ControlFlow::Continue(())).unwrap().right
}

fn answers_like_the_cpu(open: impl Fn(Precision) -> Result<Cuda, CudaError>) {
    let tokenizer = Tokenizer::train(std::iter::empty(), TRAINED_VOCABULARY_MIN).unwrap();
    let config = config_of(tokenizer.vocabulary_size(), 256);
    let model = (&config, &tokenizer);
    let parameters = parameters(&config);
    let question = |text: &str, answer| Question {
        question: text.to_owned(),
        choices: ["a gull", "a wader", "a wren", "an owl"].map(str::to_owned),
        answer,
    };
    // What the CPU takes for right.
    let on_cpu = |text: &str| {
        let is_right = |&answer: &usize| {
            right(model, &[question(text, answer)], parameters.as_slice(), &Cpu::default) == 1
        };
        question(text, (0..CHOICES).find(is_right).unwrap())
    };
    let questions =
        ["What runs along the shore?", "What hunts at night?", "Which is the smallest?"].map(on_cpu);
    let Some(mut cuda) = skip::kernels(open(Precision::F32)) else { return };
    let held = on_device(&mut cuda, &config);
    assert_eq!(right(model, &questions, &*held, &|| cuda.beside()), questions.len());
}

#[test]
fn an_emulated_gpu_evaluates_and_generates_like_the_cpu() {
    evaluates_like_the_cpu(Cuda::emulated);
    generates_like_the_cpu(Cuda::emulated);
    answers_like_the_cpu(Cuda::emulated);
}

#[test]
fn a_gpu_evaluates_and_generates_like_the_cpu() {
    evaluates_like_the_cpu(|precision| Cuda::new(0, precision));
    generates_like_the_cpu(|precision| Cuda::new(0, precision));
    answers_like_the_cpu(|precision| Cuda::new(0, precision));
}
