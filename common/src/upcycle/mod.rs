//! Upcycling: a dense Llama checkpoint becomes a mixture of experts.
//!
//! Sources: "Llama 3 Meets MoE" (arXiv 2412.09952) and "Upcycling Large Language Models into Mixture of Experts"
//! (arXiv 2410.07524). With granularity G, each of the N experts has a G-th of the dense network's width: expert i holds
//! shard i mod G (rows of gate and up, columns of down) and belongs to virtual group i div G. The router has one random
//! row per group, repeated for its G experts, so that at the start the top-T choice picks whole copies of the dense
//! network. Everything else is copied.
//!
//! The same dense values, recipe and seed give the same bits everywhere: products are taken in float64 and rounded
//! once, and random rows come from a named generator.

mod recipe;

use std::ops::Range;

pub use self::recipe::{Recipe, Scaling, UpcycleError, scales};
use crate::checkpoint::{CheckpointError, TensorSource, flatten};
use crate::init::{INIT_STD, Purpose, normal_pair, stream};
use crate::layout::Layout;
use crate::model_config::ModelConfig;

/// The tensors of an upcycled model, made from those of the dense one as they are asked for.
pub struct Upcycled<'a> {
    recipe: Recipe,
    dense: &'a dyn TensorSource,
    config: ModelConfig,
    layout: Layout,
    scales: Scales,
}

/// What each matrix of an expert is multiplied by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scales {
    /// Of the gate projection.
    pub gate: f64,
    /// Of the up projection.
    pub up: f64,
    /// Of the down projection.
    pub down: f64,
}

/// One matrix of an expert.
#[derive(Clone, Copy)]
enum Part {
    Gate,
    Up,
    Down,
}

impl<'a> Upcycled<'a> {
    /// The model that `recipe` makes of a dense one.
    ///
    /// # Errors
    /// An [`UpcycleError`] if the recipe does not fit the dense model.
    pub fn new(
        recipe: &Recipe,
        dense_config: &ModelConfig,
        dense: &'a dyn TensorSource,
    ) -> Result<Self, UpcycleError> {
        let config = recipe.config(dense_config)?;
        let layout = config.layout()?;
        Ok(Self { recipe: *recipe, dense, config, layout, scales: scales(recipe) })
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The layout of its parameters.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Whether weights are scaled by powers of two only, or not at all, which any floating-point format holds exactly.
    pub fn scales_by_powers_of_two(&self) -> bool {
        let Scales { gate, up, down } = self.scales;
        [gate, up, down].iter().all(|&scale| libm::frexp(scale).0 == 0.5)
    }

    /// All its parameters, flat.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] if the dense values cannot be read.
    pub fn parameters(&self) -> Result<Vec<f32>, CheckpointError> {
        flatten(&self.layout, self)
    }

    /// Rows of an expert's matrix.
    fn expert_rows(
        &self,
        (layer, expert, part): (usize, usize, Part),
        rows: Range<usize>,
        sink: &mut dyn FnMut(&[f32]),
    ) -> Result<(), CheckpointError> {
        let width = self.config.intermediate_size;
        let start = expert % self.recipe.granularity * width;
        let (name, scale) = match part {
            Part::Gate => ("gate_proj", self.scales.gate),
            Part::Up => ("up_proj", self.scales.up),
            Part::Down => ("down_proj", self.scales.down),
        };
        let name = format!("model.layers.{layer}.mlp.{name}.weight");
        let mut scaled = Vec::new();
        let mut hand_out = |row: &[f32]| {
            if scale == 1.0 {
                return sink(row);
            }
            scaled.clear();
            scaled.extend(row.iter().map(|&value| (f64::from(value) * scale) as f32));
            sink(&scaled);
        };
        match part {
            Part::Gate | Part::Up => {
                self.dense.rows(&name, start + rows.start..start + rows.end, &mut hand_out)
            }
            Part::Down => self.dense.rows(&name, rows, &mut |row| hand_out(&row[start..start + width])),
        }
    }

    /// Rows of a layer's router.
    fn router_rows(&self, layer: usize, rows: Range<usize>, sink: &mut dyn FnMut(&[f32])) {
        let width = self.config.hidden_size;
        let group_rows = router_group_rows(&self.recipe, layer, width);
        let repeated = repeat_group_rows(&group_rows, width, self.recipe.granularity);
        repeated[rows.start * width..rows.end * width].chunks_exact(width).for_each(sink);
    }
}

impl TensorSource for Upcycled<'_> {
    fn rows(
        &self,
        name: &str,
        rows: Range<usize>,
        sink: &mut dyn FnMut(&[f32]),
    ) -> Result<(), CheckpointError> {
        match place(name) {
            Some((layer, Place::Router)) => {
                self.router_rows(layer, rows, sink);
                Ok(())
            }
            Some((layer, Place::Expert(expert, part))) => self.expert_rows((layer, expert, part), rows, sink),
            None => self.dense.rows(name, rows, sink),
        }
    }
}

/// What a tensor of the mixture is.
enum Place {
    Router,
    Expert(usize, Part),
}

/// Layer and place of a tensor that the dense model does not have.
fn place(name: &str) -> Option<(usize, Place)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let rest = rest.strip_prefix("block_sparse_moe.")?;
    let place = match rest.strip_prefix("experts.") {
        None => Place::Router,
        Some(rest) => {
            let (expert, matrix) = rest.split_once('.')?;
            let part = match matrix {
                "w1.weight" => Part::Gate,
                "w3.weight" => Part::Up,
                "w2.weight" => Part::Down,
                _ => return None,
            };
            Place::Expert(expert.parse().ok()?, part)
        }
    };
    Some((layer.parse().ok()?, place))
}

/// One router row of `width` per virtual group, normal with standard deviation [`INIT_STD`].
fn router_group_rows(recipe: &Recipe, layer: usize, width: usize) -> Vec<f32> {
    let mut rng = stream(recipe.seed, Purpose::Router, layer as u64);
    let count = recipe.experts / recipe.granularity * width;
    let pairs = (0..count.div_ceil(2)).flat_map(|_| <[f64; 2]>::from(normal_pair(&mut rng)));
    pairs.take(count).map(|value| (value * INIT_STD) as f32).collect()
}

/// Each row of a (groups, width) matrix `granularity` times: the router (experts, width).
pub fn repeat_group_rows(rows: &[f32], width: usize, granularity: usize) -> Vec<f32> {
    rows.chunks_exact(width).flat_map(|row| row.repeat(granularity)).collect()
}
