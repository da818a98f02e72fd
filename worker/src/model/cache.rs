//! What generation remembers of a sequence.

use sanderling_common::model_config::ModelConfig;

use crate::kernels::Kernels;

/// The keys and values of one sequence that grows: with them a further token costs the pass of one token.
///
/// It belongs to the model that made it ([`Model::new_cache`](super::Model::new_cache)) and to the parameters that its
/// tokens were computed with.
pub struct Cache<K: Kernels> {
    pub(super) capacity: usize,
    pub(super) len: usize,
    /// Per layer, the keys and values of each token (capacity, 2 · kv_heads · head_dim).
    pub(super) layers: Vec<K::Storage>,
}

impl<K: Kernels> Cache<K> {
    pub(super) fn new(config: &ModelConfig, kernels: &mut K, capacity: usize) -> Result<Self, K::Error> {
        let width = 2 * config.kv_heads * config.head_dim;
        let layers = (0..config.layers).map(|_| kernels.allocate_activations(capacity * width));
        Ok(Self { capacity, len: 0, layers: layers.collect::<Result<_, _>>()? })
    }

    /// Tokens it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds no token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens that there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all tokens; the memory stays.
    pub fn clear(&mut self) {
        self.len = 0;
    }
}
