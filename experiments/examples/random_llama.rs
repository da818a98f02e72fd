//! Writes a dense Llama checkpoint of Llama-3.2-1B's shape with random weights, to see what large checkpoints cost:
//!
//!     cargo run --release -p sanderling --example random_llama -- DIR
//!     /usr/bin/time -v target/release/sanderling upcycle --dense DIR --out OUT      # "Maximum resident set size"

use std::ops::{ControlFlow, Range};
use std::path::PathBuf;

use clap::Parser;
use sanderling_common::checkpoint::{
    CheckpointError, StoredType, TensorSource, WriteOptions, row_shape, write,
};
use sanderling_common::init::{INIT_STD, Purpose, normal_pair, stream};
use sanderling_common::layout::Layout;
use sanderling_common::model_config::{FeedForward, Llama3Rope, ModelConfig};

#[derive(Debug, Parser)]
struct Arguments {
    /// Where it goes
    directory: PathBuf,
    /// Decoder layers
    #[arg(long, default_value_t = 16)]
    layers: usize,
    /// Width of the residual stream
    #[arg(long, default_value_t = 2048)]
    hidden_size: usize,
    /// Width of the feed-forward network
    #[arg(long, default_value_t = 8192)]
    intermediate_size: usize,
    /// Tokens
    #[arg(long, default_value_t = 128_256)]
    vocab_size: usize,
}

/// Normal values, drawn as they are asked for.
struct Random(Layout);

impl TensorSource for Random {
    fn rows(
        &self,
        name: &str,
        rows: Range<usize>,
        sink: &mut dyn FnMut(&[f32]),
    ) -> Result<(), CheckpointError> {
        let number =
            self.0.tensors().iter().position(|tensor| tensor.name == name).expect("a tensor of the model");
        let (_, width) = row_shape(&self.0.tensors()[number].shape);
        let mut rng = stream(number as u64, Purpose::Parameters, rows.start as u64);
        for _ in rows {
            let pairs = (0..width.div_ceil(2)).flat_map(|_| <[f64; 2]>::from(normal_pair(&mut rng)));
            let row: Vec<f32> = pairs.take(width).map(|value| (value * INIT_STD) as f32).collect();
            sink(&row);
        }
        Ok(())
    }
}

fn main() -> anyhow::Result<()> {
    let Arguments { directory, layers, hidden_size, intermediate_size, vocab_size } = Arguments::parse();
    let config = ModelConfig {
        vocab_size,
        hidden_size,
        layers,
        heads: hidden_size / 64,
        kv_heads: hidden_size / 256,
        head_dim: 64,
        intermediate_size,
        feed_forward: FeedForward::Dense,
        shared_expert: None,
        qkv_bias: false,
        rms_norm_eps: 1e-5,
        rope_theta: 500_000.0,
        rope_llama3: Some(Llama3Rope {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        }),
        tie_word_embeddings: true,
        context: 131_072,
    };
    let options = WriteOptions { stored_type: StoredType::Bfloat16, ..WriteOptions::default() };
    write(&directory, &config, &options, &Random(config.layout()?), &mut |_| ControlFlow::Continue(()))?;
    Ok(())
}
