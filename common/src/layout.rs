//! The parameter layout: one flat `f32` vector, cut into named tensors.
//!
//! Server and worker hold the model as one vector. The layout says which range is which tensor (Hugging Face
//! names), and its hash, compared at hello, makes sure that both mean the same thing by an offset.

use std::fmt;
use std::ops::Range;

use sha2::{Digest, Sha256};

/// The most elements one tensor may have: tensor-relative indices are `u32` everywhere.
pub const TENSOR_ELEMENTS_MAX: usize = u32::MAX as usize;

/// One named tensor inside the flat parameter vector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Row-major shape; `[out, in]` for matrices.
    pub shape: Vec<usize>,
    /// Where the tensor starts in the flat vector, in elements.
    pub offset: usize,
    /// Number of elements, the product of `shape`.
    pub len: usize,
}

impl TensorSpec {
    /// The tensor's range in the flat vector.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }
}

/// What is wrong with a proposed layout.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    /// Two tensors share a name.
    #[error("two tensors are named {0}")]
    DuplicateName(String),
    /// A tensor without elements.
    #[error("tensor {0} has no elements (shape {1:?})")]
    Empty(String, Vec<usize>),
    /// A tensor whose elements a `u32` cannot index.
    #[error("tensor {name} has {len} elements; at most {TENSOR_ELEMENTS_MAX} are supported")]
    TooLarge {
        /// The tensor's name.
        name: String,
        /// Its number of elements, saturating.
        len: usize,
    },
}

/// The SHA-256 of a layout: names, shapes and order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct LayoutHash(pub [u8; 32]);

impl fmt::Display for LayoutHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for LayoutHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LayoutHash({self})")
    }
}

/// Named tensors, in order, filling a flat vector without gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    tensors: Vec<TensorSpec>,
    len: usize,
}

impl Layout {
    /// Lays the tensors out one after the other.
    ///
    /// # Errors
    /// A [`LayoutError`] for a repeated name, an empty tensor, or one that a `u32` cannot index.
    pub fn new<N: Into<String>>(
        tensors: impl IntoIterator<Item = (N, Vec<usize>)>,
    ) -> Result<Self, LayoutError> {
        let mut names = std::collections::HashSet::new();
        let mut specs = Vec::new();
        let mut offset = 0;
        for (name, shape) in tensors {
            let name = name.into();
            let len = shape.iter().fold(1usize, |product, &side| product.saturating_mul(side));
            if len == 0 {
                return Err(LayoutError::Empty(name, shape));
            }
            if len > TENSOR_ELEMENTS_MAX {
                return Err(LayoutError::TooLarge { name, len });
            }
            if !names.insert(name.clone()) {
                return Err(LayoutError::DuplicateName(name));
            }
            specs.push(TensorSpec { name, shape, offset, len });
            offset += len;
        }
        Ok(Self { tensors: specs, len: offset })
    }

    /// The tensors in order of their offsets.
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.tensors
    }

    /// Elements of the whole flat vector.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no tensor at all.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// The tensor of that name.
    pub fn find(&self, name: &str) -> Option<&TensorSpec> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// The range of the flat vector that a run of tensors covers.
    ///
    /// # Panics
    /// If `tensors` does not lie within the layout.
    pub fn elements(&self, tensors: Range<usize>) -> Range<usize> {
        let start = self.tensors.get(tensors.start).map_or(self.len, |tensor| tensor.offset);
        let end = if tensors.is_empty() { start } else { self.tensors[tensors.end - 1].range().end };
        start..end
    }

    /// Cuts the tensors into at most `count` runs of about the same number of elements.
    ///
    /// Selection is per tensor, so where the cuts fall changes no bit of any result.
    pub fn shards(&self, count: usize) -> Vec<Range<usize>> {
        let count = count.clamp(1, self.tensors.len().max(1));
        let mut shards = Vec::with_capacity(count);
        let mut first = 0;
        for shard in 0..count {
            let target = self.len * (shard + 1) / count;
            let last_allowed = self.tensors.len() - (count - shard - 1);
            let mut end = (first + 1).min(last_allowed);
            while end < last_allowed && self.tensors[end].offset + self.tensors[end].len / 2 < target {
                end += 1;
            }
            let end = if shard + 1 == count { self.tensors.len() } else { end };
            shards.push(first..end);
            first = end;
        }
        shards
    }

    /// The hash that both sides compare at hello.
    pub fn hash(&self) -> LayoutHash {
        let mut hasher = Sha256::new();
        hasher.update(b"sanderling layout 1\0");
        for tensor in &self.tensors {
            hasher.update((tensor.name.len() as u64).to_le_bytes());
            hasher.update(tensor.name.as_bytes());
            hasher.update((tensor.shape.len() as u64).to_le_bytes());
            for &side in &tensor.shape {
                hasher.update((side as u64).to_le_bytes());
            }
        }
        LayoutHash(hasher.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(lens: &[usize]) -> Layout {
        Layout::new(lens.iter().enumerate().map(|(i, &len)| (format!("t{i}"), vec![len]))).unwrap()
    }

    #[test]
    fn offsets_follow_one_another() {
        let layout = layout(&[40, 7, 128]);
        assert_eq!(layout.tensors().iter().map(|t| t.offset).collect::<Vec<_>>(), [0, 40, 47]);
        assert_eq!(layout.len(), 175);
        assert_eq!(layout.elements(1..3), 40..175);
        assert_eq!(layout.elements(3..3), 175..175);
    }

    #[test]
    fn shards_cover_every_tensor_once_and_are_never_empty() {
        let layout = layout(&[1000, 1, 1, 500, 400, 3, 900, 20]);
        for count in 1..12 {
            let shards = layout.shards(count);
            assert_eq!(shards.len(), count.min(8));
            assert_eq!(shards[0].start, 0);
            assert_eq!(shards.last().unwrap().end, 8);
            assert!(shards.iter().all(|shard| !shard.is_empty()), "{shards:?}");
            assert!(shards.windows(2).all(|pair| pair[0].end == pair[1].start), "{shards:?}");
        }
    }

    #[test]
    fn hash_depends_on_name_shape_and_order() {
        let make = |tensors: &[(&str, &[usize])]| {
            Layout::new(tensors.iter().map(|(n, s)| (*n, s.to_vec()))).unwrap().hash()
        };
        let base = make(&[("a", &[2, 3]), ("b", &[4])]);
        assert_eq!(base, make(&[("a", &[2, 3]), ("b", &[4])]));
        assert_ne!(base, make(&[("a", &[3, 2]), ("b", &[4])]));
        assert_ne!(base, make(&[("b", &[4]), ("a", &[2, 3])]));
        assert_ne!(base, make(&[("a", &[2, 3]), ("c", &[4])]));
    }

    #[test]
    fn refuses_nonsense() {
        let twice = Layout::new([("a", vec![1]), ("a", vec![2])]);
        assert_eq!(twice.unwrap_err(), LayoutError::DuplicateName("a".into()));
        assert_eq!(Layout::new([("a", vec![0])]).unwrap_err(), LayoutError::Empty("a".into(), vec![0]));
        let large = Layout::new([("a", vec![usize::MAX, 2])]).unwrap_err();
        assert!(matches!(large, LayoutError::TooLarge { .. }), "{large}");
    }
}
