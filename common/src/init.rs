//! Seeded initialisation: the same configuration and seed give the same bits on every machine.

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::layout::Layout;
use crate::model_config::{ModelConfig, ModelConfigError};

/// Standard deviation of every matrix, as in the GPT-2 and Llama code bases.
pub const INIT_STD: f64 = 0.02;

/// The generator for one named purpose of a run: independent of every other purpose and of the order of calls.
///
/// ChaCha12 is counter-based and specified, so the stream does not depend on the platform.
pub fn stream(seed: u64, purpose: Purpose, index: u64) -> ChaCha12Rng {
    let mut key = [0u8; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&(purpose as u64).to_le_bytes());
    key[16..24].copy_from_slice(&index.to_le_bytes());
    ChaCha12Rng::from_seed(key)
}

/// What a random stream is for; part of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// Initial parameters; the index is the tensor's number.
    Parameters = 1,
    /// Where the windows of a training batch start; the index is the batch's number.
    Batch = 2,
    /// Sampling of generated text; the index is the sample's number.
    Generation = 3,
    /// Speeds and delays in simulation; the index is the worker's number.
    Simulation = 4,
    /// Routers of an upcycled model; the index is the layer's number.
    Router = 5,
}

/// A uniform number in [0, 1) with 53 random bits.
pub fn uniform(rng: &mut impl Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// Two independent standard normal numbers (Box–Muller, through `libm` so that all platforms agree).
pub fn normal_pair(rng: &mut impl Rng) -> (f64, f64) {
    let radius = libm::sqrt(-2.0 * libm::log(1.0 - uniform(rng)));
    let angle = std::f64::consts::TAU * uniform(rng);
    (radius * libm::cos(angle), radius * libm::sin(angle))
}

/// The initial flat parameter vector θ0 of a model, `layout.len()` elements.
///
/// Norm weights are one, biases zero. Matrices are normal with standard deviation [`INIT_STD`]; those that write into the
/// residual stream (o_proj, down_proj, w2) are divided by √(2·layers), so that its variance does not grow with
/// depth (GPT-2, section 2.3).
///
/// # Errors
/// A [`ModelConfigError`] if the configuration has no layout.
pub fn initial_parameters(config: &ModelConfig, seed: u64) -> Result<Vec<f32>, ModelConfigError> {
    let layout = config.layout()?;
    let mut parameters = vec![0.0; layout.len()];
    let residual_std = INIT_STD / libm::sqrt(2.0 * config.layers as f64);
    for (number, tensor) in layout.tensors().iter().enumerate() {
        let values = &mut parameters[tensor.range()];
        if tensor.shape.len() == 1 {
            values.fill(if tensor.name.ends_with(".bias") { 0.0 } else { 1.0 });
            continue;
        }
        let writes_residual =
            ["o_proj.weight", "down_proj.weight", ".w2.weight"].iter().any(|end| tensor.name.ends_with(end));
        let std = if writes_residual { residual_std } else { INIT_STD };
        let mut rng = stream(seed, Purpose::Parameters, number as u64);
        for pair in values.chunks_mut(2) {
            let (a, b) = normal_pair(&mut rng);
            pair[0] = (a * std) as f32;
            if let Some(second) = pair.get_mut(1) {
                *second = (b * std) as f32;
            }
        }
    }
    Ok(parameters)
}

/// SHA-256 over a run of tensors: the hash of the concatenated hashes of each tensor's little-endian bytes.
///
/// Hashing per tensor lets shards of any cut arrive at the same digest; see [`combine_tensor_hashes`].
pub fn parameters_hash(layout: &Layout, parameters: &[f32]) -> [u8; 32] {
    combine_tensor_hashes(layout.tensors().iter().map(|tensor| tensor_hash(&parameters[tensor.range()])))
}

/// SHA-256 of one tensor's little-endian bytes.
pub fn tensor_hash(values: &[f32]) -> [u8; 32] {
    use sha2::{Digest, Sha256};
    let mut hasher = Sha256::new();
    let mut bytes = [0u8; 4096];
    for chunk in values.chunks(bytes.len() / 4) {
        for (slot, value) in bytes.chunks_exact_mut(4).zip(chunk) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
        hasher.update(&bytes[..chunk.len() * 4]);
    }
    hasher.finalize().into()
}

/// The digest of a model from the digests of its tensors, in layout order.
pub fn combine_tensor_hashes(hashes: impl IntoIterator<Item = [u8; 32]>) -> [u8; 32] {
    use sha2::{Digest, Sha256};
    let mut hasher = Sha256::new();
    hashes.into_iter().for_each(|hash| hasher.update(hash));
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_reproducible_and_distinct() {
        let draw = |seed, purpose, index| stream(seed, purpose, index).next_u64();
        assert_eq!(draw(1, Purpose::Batch, 7), draw(1, Purpose::Batch, 7));
        assert_ne!(draw(1, Purpose::Batch, 7), draw(1, Purpose::Batch, 8));
        assert_ne!(draw(1, Purpose::Batch, 7), draw(2, Purpose::Batch, 7));
        assert_ne!(draw(1, Purpose::Batch, 7), draw(1, Purpose::Parameters, 7));
    }

    #[test]
    fn normal_numbers_have_the_right_moments() {
        let mut rng = stream(3, Purpose::Parameters, 0);
        let numbers: Vec<f64> = (0..50_000).flat_map(|_| <[f64; 2]>::from(normal_pair(&mut rng))).collect();
        let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
        let variance = numbers.iter().map(|x| x * x).sum::<f64>() / numbers.len() as f64;
        assert!(mean.abs() < 0.02, "{mean}");
        assert!((variance - 1.0).abs() < 0.03, "{variance}");
    }
}
