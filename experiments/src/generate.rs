//! Sampling text from a model.

use std::ops::ControlFlow;

use sanderling_common::init::{Purpose, stream, uniform};
use sanderling_common::model_config::ModelConfig;
use sanderling_worker::kernels::Kernels;
use sanderling_worker::kernels::cpu::Cpu;
use sanderling_worker::model::{Cache, Model, ModelError};

/// The most tokens that a generator keeps in sight, whatever the model's context: bounds the memory of its cache.
pub const SIGHT_MAX: usize = 8192;

/// Tokens of a prompt that are read at a time; between them the receiver may end the stream.
const PROMPT_TOKENS: usize = 256;

/// How a token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Tokens are drawn from the softmax of the logits over this; at 0 the likeliest is taken.
    pub temperature: f32,
    /// Tokens are drawn from the smallest set of likeliest ones whose probabilities sum to at least this; 1 leaves
    /// all of them.
    pub top_p: f32,
    /// The same seed gives the same tokens.
    pub seed: u64,
}

/// Why a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All tokens that were asked for were made.
    Count,
    /// This stop token came, and was not handed out.
    StopToken(u32),
    /// The receiver wanted no more.
    Receiver,
}

/// A model that continues a sequence, one token at a time.
///
/// What it sees is held in a cache of the context's length, at most [`SIGHT_MAX`]. When the cache is full, the last
/// half of it is kept and computed anew as the beginning of a sequence, so the model always sees at least half of the
/// cache's length of what came before.
pub struct Generator<'a, K: Kernels = Cpu> {
    model: Model<K>,
    parameters: &'a K::Buffer,
    cache: Cache<K>,
}

impl<'a> Generator<'a> {
    /// A generator on the CPU for a model with these flat parameters.
    ///
    /// # Errors
    /// A [`ModelError`] if the configuration makes no model.
    pub fn new(config: &ModelConfig, parameters: &'a [f32]) -> Result<Self, ModelError> {
        Self::with(Cpu::default(), config, parameters)
    }
}

impl<'a, K: Kernels> Generator<'a, K> {
    /// A generator for a model whose flat parameters are where the kernels compute.
    ///
    /// # Errors
    /// A [`ModelError`] if the configuration makes no model, or the device has no room for it.
    pub fn with(kernels: K, config: &ModelConfig, parameters: &'a K::Buffer) -> Result<Self, ModelError> {
        let mut model = Model::new(config.clone(), kernels)?;
        let cache = model.new_cache(config.context.min(SIGHT_MAX))?;
        Ok(Self { model, parameters, cache })
    }

    /// Tokens that are in sight at a time.
    pub fn sight(&self) -> usize {
        self.cache.capacity()
    }

    /// Hands up to `count` tokens that follow `prompt` to `on_token`, each as soon as it is drawn, until one of
    /// `stop_tokens` comes or `on_token` breaks, which is also asked, with nothing, while a long prompt is read. Of a
    /// prompt that is longer than the cache, its end is seen.
    ///
    /// # Errors
    /// A [`ModelError`] for a prompt that is empty or has a token outside the vocabulary.
    pub fn stream(
        &mut self,
        prompt: &[u32],
        options: &Sampling,
        count: usize,
        stop_tokens: &[u32],
        mut on_token: impl FnMut(Option<u32>) -> ControlFlow<()>,
    ) -> Result<Ending, ModelError> {
        let mut rng = stream(options.seed, Purpose::Generation, 0);
        let capacity = self.cache.capacity();
        // The tokens of the cache, and from `self.cache.len()` on those that are to follow.
        let mut seen = prompt[prompt.len().saturating_sub(capacity)..].to_vec();
        self.cache.clear();
        for _ in 0..count {
            if seen.len() > capacity {
                seen.drain(..seen.len() - capacity.div_ceil(2));
                self.cache.clear();
            }
            while seen.len() - self.cache.len() > PROMPT_TOKENS {
                let some = self.cache.len()..self.cache.len() + PROMPT_TOKENS;
                self.model.extend(self.parameters, &mut self.cache, &seen[some])?;
                if on_token(None).is_break() {
                    return Ok(Ending::Receiver);
                }
            }
            let new = &seen[self.cache.len()..];
            let logits = self.model.extend(self.parameters, &mut self.cache, new)?;
            let token = draw(logits, options, uniform(&mut rng));
            if stop_tokens.contains(&token) {
                return Ok(Ending::StopToken(token));
            }
            if on_token(Some(token)).is_break() {
                return Ok(Ending::Receiver);
            }
            seen.push(token);
        }
        Ok(Ending::Count)
    }

    /// `count` tokens that follow `prompt`.
    ///
    /// # Errors
    /// As [`stream`](Self::stream).
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &Sampling,
        count: usize,
    ) -> Result<Vec<u32>, ModelError> {
        let mut tokens = Vec::new();
        self.stream(prompt, options, count, &[], |token| {
            tokens.extend(token);
            ControlFlow::Continue(())
        })?;
        Ok(tokens)
    }
}

/// The token at which the cumulated probability of those that may be drawn passes `point` in [0, 1).
fn draw(logits: &[f32], options: &Sampling, point: f64) -> u32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if options.temperature <= 0.0 {
        let place = logits.iter().position(|&logit| logit == largest);
        return place.unwrap_or(0) as u32;
    }
    let weight = |logit: f32| libm::exp(f64::from((logit - largest) / options.temperature));
    let mut weights: Vec<f64> = logits.iter().map(|&logit| weight(logit)).collect();
    if options.top_p < 1.0 {
        keep_likeliest(&mut weights, f64::from(options.top_p));
    }
    let total: f64 = weights.iter().sum();
    let mut left = point * total;
    let mut last = 0;
    for (token, &weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
        left -= weight;
        last = token as u32;
        if left < 0.0 {
            break;
        }
    }
    last
}

/// Zeroes all weights but the largest ones that make up at least the share `top_p` of the sum, ties to the lower
/// index; at least one stays.
fn keep_likeliest(weights: &mut [f64], top_p: f64) {
    let enough = top_p * weights.iter().sum::<f64>();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
    let mut sum = 0.0;
    let mut kept = 0;
    while kept < order.len() && (kept == 0 || sum < enough) {
        sum += weights[order[kept]];
        kept += 1;
    }
    order[kept..].iter().for_each(|&token| weights[token] = 0.0);
}

#[cfg(test)]
mod tests {
    use ndarray::ArrayView2;
    use sanderling_common::init::initial_parameters;
    use sanderling_common::model_config::FeedForward;

    use super::*;

    fn at(temperature: f32, top_p: f32) -> Sampling {
        Sampling { temperature, top_p, seed: 1 }
    }

    #[test]
    fn draws_by_probability() {
        let logits = [0.0, f32::NEG_INFINITY, 3.0f32.ln()];
        let draw = |temperature, point| draw(&logits, &at(temperature, 1.0), point);
        assert_eq!(draw(1.0, 0.0), 0);
        assert_eq!(draw(1.0, 0.2499), 0);
        assert_eq!(draw(1.0, 0.2501), 2);
        assert_eq!(draw(1.0, 0.9999), 2);
        assert_eq!(draw(0.0, 0.0), 2);
        assert_eq!(draw(0.1, 0.01), 2);
    }

    #[test]
    fn the_smallest_set_of_likeliest_tokens_is_drawn_from() {
        // Probabilities 0.2, 0.4, 0.1, 0.3.
        let logits = [2.0f32.ln(), 4.0f32.ln(), 0.0, 3.0f32.ln()];
        let drawn = |top_p| {
            let mut tokens: Vec<u32> =
                (0..1000).map(|i| draw(&logits, &at(1.0, top_p), f64::from(i) / 1000.0)).collect();
            tokens.dedup();
            tokens
        };
        assert_eq!(drawn(0.0), [1]);
        assert_eq!(drawn(0.39), [1]);
        assert_eq!(drawn(0.41), [1, 3]);
        assert_eq!(drawn(0.69), [1, 3]);
        assert_eq!(drawn(0.71), [0, 1, 3]);
        assert_eq!(drawn(0.91), [0, 1, 2, 3]);
        // 4/7 of what is left belongs to the likeliest.
        assert_eq!(draw(&logits, &at(1.0, 0.6), 0.57), 1);
        assert_eq!(draw(&logits, &at(1.0, 0.6), 0.58), 3);
        // Equal ones: the lower index stays.
        assert_eq!(draw(&[1.0, 1.0, 1.0], &at(1.0, 0.5), 0.99), 1);
    }

    const CONTEXT: usize = 10;

    fn config() -> ModelConfig {
        ModelConfig {
            vocab_size: 13,
            hidden_size: 16,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            head_dim: 8,
            intermediate_size: 24,
            feed_forward: FeedForward::Dense,
            shared_expert: None,
            qkv_bias: false,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_llama3: None,
            tie_word_embeddings: false,
            context: CONTEXT,
        }
    }

    /// Weights large enough that the likeliest token changes from place to place.
    fn parameters() -> Vec<f32> {
        initial_parameters(&config(), 3)
            .unwrap()
            .iter()
            .map(|p| if *p == 1.0 { 1.0 } else { p * 30.0 })
            .collect()
    }

    /// Every token follows from the window that the documentation promises, also when the cache was full.
    #[test]
    fn a_full_cache_goes_on_with_its_last_half() {
        let (config, parameters) = (config(), parameters());
        let prompt: Vec<u32> = (0..13).collect();
        let made =
            Generator::new(&config, &parameters).unwrap().generate(&prompt, &at(0.0, 1.0), 23).unwrap();
        let mut model = Model::new(config, Cpu::default()).unwrap();
        let mut window = prompt[3..].to_vec();
        for &token in &made {
            if window.len() > CONTEXT {
                window.drain(..window.len() - CONTEXT / 2);
            }
            let input = ArrayView2::from_shape((1, window.len()), &window).unwrap();
            let logits = model.logits(&parameters, input).unwrap();
            let last: Vec<f32> = logits.slice(ndarray::s![0, -1, ..]).to_vec();
            assert_eq!(draw(&last, &at(0.0, 1.0), 0.0), token);
            window.push(token);
        }
        let mut distinct = made.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert!(distinct.len() > 2, "{made:?} would agree with anything");
    }

    #[test]
    fn streams_end_at_a_stop_token_or_when_nobody_listens() {
        let (config, parameters) = (config(), parameters());
        let mut generator = Generator::new(&config, &parameters).unwrap();
        let options = at(1.0, 0.9);
        let made = generator.generate(&[1, 2], &options, 30).unwrap();
        assert_eq!(
            generator.generate(&[1, 2], &options, 30).unwrap(),
            made,
            "the same seed, the same tokens"
        );
        let other = Sampling { seed: 2, ..options };
        assert_ne!(generator.generate(&[1, 2], &other, 30).unwrap(), made);

        let stop = made[7];
        let first = made.iter().position(|&token| token == stop).unwrap();
        let mut received = Vec::new();
        let ending = generator.stream(&[1, 2], &options, 30, &[stop], |token| {
            received.extend(token);
            ControlFlow::Continue(())
        });
        assert_eq!((ending.unwrap(), &received[..]), (Ending::StopToken(stop), &made[..first]));

        let mut count = 0;
        let ending = generator.stream(&[1, 2], &options, 30, &[], |_| {
            count += 1;
            if count == 4 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!((ending.unwrap(), count), (Ending::Receiver, 4));
        assert!(matches!(generator.generate(&[], &options, 1), Err(ModelError::EmptyBatch { .. })));
    }
}
