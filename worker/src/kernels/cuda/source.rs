//! The translation units of the kernels: the prelude, one or several `.cu` files, and what they are compiled for.

use super::Precision;

const PRELUDE: &str = include_str!("prelude.cuh");

/// Shared memory of a block below which attention takes smaller tiles, in bytes.
const SHARED_BYTES_LARGE: u32 = 120 * 1024;

/// Kernels that are compiled together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Unit {
    /// Sums, conversions, biases, gates, SwiGLU.
    Pointwise,
    /// RMSNorm.
    Norm,
    /// The rotary embedding.
    Rotary,
    /// The table of tokens.
    Embedding,
    /// The loss.
    CrossEntropy,
    /// Choice of experts, and the ways to slots and back.
    Router,
    /// Accumulators, selection and entries of the methods.
    Method,
    /// Products over sorted tokens.
    Experts,
    /// The same for Hopper.
    Hopper,
    /// Attention, for one width of heads.
    Attention {
        /// That width.
        head_dim: usize,
    },
}

impl Unit {
    /// Every unit; attention of widths of heads that take different ways.
    pub const ALL: [Self; 13] = [
        Self::Pointwise,
        Self::Norm,
        Self::Rotary,
        Self::Embedding,
        Self::CrossEntropy,
        Self::Router,
        Self::Method,
        Self::Experts,
        Self::Hopper,
        Self::Attention { head_dim: 64 },
        Self::Attention { head_dim: 128 },
        Self::Attention { head_dim: 20 },
        Self::Attention { head_dim: 160 },
    ];

    /// Whether it is only for Hopper, with activations of bfloat16.
    pub fn is_for_hopper(self) -> bool {
        self == Self::Hopper
    }

    fn name(self) -> &'static str {
        match self {
            Self::Pointwise => "pointwise",
            Self::Norm => "norm",
            Self::Rotary => "rotary",
            Self::Embedding => "embedding",
            Self::CrossEntropy => "cross_entropy",
            Self::Router => "router",
            Self::Method => "method",
            Self::Experts => "experts",
            Self::Hopper => "experts_hopper",
            Self::Attention { .. } => "attention",
        }
    }

    fn files(self) -> &'static [&'static str] {
        match self {
            Self::Pointwise => &[include_str!("pointwise.cu")],
            Self::Norm => &[include_str!("norm.cu")],
            Self::Rotary => &[include_str!("rotary.cu")],
            Self::Embedding => &[include_str!("embedding.cu")],
            Self::CrossEntropy => &[include_str!("cross_entropy.cu")],
            Self::Router => &[include_str!("router.cu")],
            Self::Method => &[include_str!("method.cu")],
            Self::Experts => &[include_str!("experts.cu")],
            Self::Hopper => &[include_str!("hopper.cuh"), include_str!("experts_hopper.cu")],
            Self::Attention { .. } => &[
                include_str!("attention.cu"),
                include_str!("attention_tiles.cu"),
                include_str!("attention_bf16.cu"),
                include_str!("attention_bf16_backward.cu"),
                include_str!("hopper.cuh"),
                include_str!("attention_hopper.cu"),
                include_str!("attention_hopper_forward.cu"),
                include_str!("attention_hopper_backward.cu"),
                include_str!("attention_float.cu"),
            ],
        }
    }

    /// What is compiled.
    pub fn source(self, precision: Precision, target: Target) -> Source {
        let bf16 = precision == Precision::Bf16;
        let mut defines = vec![("ACT_BF16", usize::from(bf16))];
        // The others are the same for float32 and TF32, and compiled once for both.
        if self == Self::Experts {
            let number = match precision {
                Precision::F32 => 0,
                Precision::Tf32 => 1,
                Precision::Bf16 => 2,
            };
            defines.push(("PRECISION", number));
        }
        if let Self::Attention { head_dim } = self {
            let hopper = bf16 && target.attention_for_hopper(head_dim);
            defines.extend([
                ("HEAD_DIM", head_dim),
                ("SMALL_SHARED", usize::from(target.small_shared)),
                ("ATTENTION_HOPPER", usize::from(hopper)),
            ]);
        }
        let mut text = String::from(PRELUDE);
        self.files().iter().for_each(|file| {
            text.push('\n');
            text.push_str(file);
        });
        let defines = defines.into_iter().map(|(name, value)| format!("-D{name}={value}")).collect();
        Source { name: self.name(), text, defines }
    }
}

/// What kernels are compiled for, beyond the architecture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// Whether blocks have less than 120 KB of shared memory.
    pub small_shared: bool,
    /// Whether the experts' products may use the copy engine and wgmma.
    pub hopper_experts: bool,
    /// Whether attention may use wgmma.
    pub hopper_attention: bool,
}

impl Target {
    /// What a device is compiled for that has that compute capability, times ten, and as much shared memory for a block, in
    /// bytes.
    pub fn of(capability: u32, shared_bytes: u32) -> Self {
        let is_hopper = capability == 90;
        let small_shared = shared_bytes < SHARED_BYTES_LARGE;
        Self { small_shared, hopper_experts: is_hopper, hopper_attention: is_hopper }
    }

    /// Whether `attention_hopper.cu` takes heads of that width.
    pub(super) fn attention_for_hopper(self, head_dim: usize) -> bool {
        self.hopper_attention && matches!(head_dim, 64 | 128)
    }
}

/// The text of a translation unit.
#[derive(Clone, Debug)]
pub struct Source {
    /// What it is called.
    pub name: &'static str,
    /// All of it.
    pub text: String,
    /// Options of the compiler that set macros.
    pub defines: Vec<String>,
}
