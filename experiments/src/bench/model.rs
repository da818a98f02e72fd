//! `sanderling bench model`: the speed of a training step.

use std::io::Write;

use anyhow::{bail, ensure};
use sanderling_common::config::RunConfig;
use sanderling_common::model_config::ModelConfig;
use sanderling_worker::kernels::cuda::{
    Cuda, CudaError, MemoryNeeded, Precision, RESERVE_BYTES, smaller_batch,
};
use sanderling_worker::kernels::timed::{Clocked, TimedCpu};
use sanderling_worker::model::{bytes_text, forward_flops_per_token};
use sanderling_worker::site::{DeviceOptions, Place};

use super::report::{Peak, Report};
use super::shape::{Shape, expert_layer};
use super::step::{Measured, measure_layer, measure_model};
use crate::commands::device::ran_out;
use crate::commands::{UsageError, say};

/// The most sequences that a batch is tried with.
const BATCH_MAX: usize = 1024;

/// Sequences of the layer's tokens, unless one asks for others.
const LAYER_BATCH: usize = 4;

/// Measure a training step: tokens/s, share of the device's peak (MFU), and what each kernel takes
///
/// A step is the forward and the backward pass with the gradient of every parameter; a method's step is not part of it.
/// FLOPs count products and attention, forward and backward as three times forward, active parameters only.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling bench model                                        # the default model on one CPU core
  sanderling bench model --device cuda                          # dense, e8t2 and layer, with batches as large as fit
  sanderling bench model --device cuda --shape e8t2 --batch 4 --json | jq .mfu_causal")]
pub struct Arguments {
    /// What is measured, several times for several [default: on the CPU default, on a GPU dense, e8t2 and layer]
    #[arg(long, value_enum)]
    shape: Vec<Shape>,
    /// Sequences of a batch [default: on the CPU as many as `train` has, or 1; on a GPU as many as fit, up to 1024; 4 for layer]
    #[arg(long, allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: Option<u16>,
    /// Tokens of a sequence [default: 128 for default, 4096 for the others]
    #[arg(long, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    context: Option<u32>,
    /// Layers of the model [default: 4 for default, 16 for dense and e8t2]
    #[arg(long, allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..=1024))]
    layers: Option<u16>,
    /// Steps that are measured, after two that are not
    #[arg(long, allow_negative_numbers = true, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// The device's peak in TFLOP/s, where it is not known [default: NVIDIA's figure for A100, H100 and H200, but NVL]
    #[arg(long, value_name = "TFLOPS", allow_negative_numbers = true)]
    peak: Option<f64>,
    /// Where and how precisely.
    #[command(flatten)]
    device: DeviceOptions,
    /// Print a line of JSON per shape
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps a step from being measured, in a sentence.
pub fn model(arguments: &Arguments) -> anyhow::Result<()> {
    if let Some(peak) = arguments.peak {
        let is_peak = peak.is_finite() && peak > 0.0;
        ensure!(is_peak, UsageError(format!("--peak {peak} is no speed; it is a number of TFLOP/s")));
    }
    let (place, said) = arguments.device.open()?;
    // Nobody is left to tell when standard error is closed.
    let _ = writeln!(std::io::stderr(), "{said}");
    let shapes: &[Shape] = match (&arguments.shape[..], &place) {
        ([], Place::Cpu) => &[Shape::Default],
        ([], Place::Gpu(_)) => &[Shape::Dense, Shape::E8t2, Shape::Layer],
        (shapes, _) => shapes,
    };
    let mut without_room = 0;
    for &shape in shapes {
        let measured = match &place {
            Place::Cpu => on_cpu(arguments, shape),
            Place::Gpu(gpu) => on_gpu(arguments, shape, gpu.kernels()),
        };
        // One of several that has no room keeps nobody from the others.
        match measured {
            Err(error) if error.is::<NoRoom>() && shapes.len() > 1 => {
                let _ = writeln!(std::io::stderr(), "{error}");
                without_room += 1;
            }
            measured => measured?,
        }
    }
    ensure!(without_room == 0, "{without_room} of {} shapes have no room", shapes.len());
    Ok(())
}

/// A shape that does not fit the memory, in a sentence.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NoRoom(String);

impl Arguments {
    fn context(&self, shape: Shape) -> usize {
        self.context.map_or(shape.context(), |context| context as usize)
    }

    fn batch(&self) -> Option<usize> {
        self.batch.map(usize::from)
    }

    fn config(&self, shape: Shape) -> Option<ModelConfig> {
        shape.config(self.layers.map(usize::from), self.context(shape))
    }

    /// What a step with so many sequences takes, in bytes.
    fn needed(&self, shape: Shape, precision: Precision, batch: usize) -> anyhow::Result<usize> {
        let rows = batch * self.context(shape);
        Ok(match self.config(shape) {
            Some(config) => MemoryNeeded::new(&config, precision, rows)?.bytes(),
            None => expert_layer(rows).bytes(precision),
        })
    }
}

fn on_cpu(arguments: &Arguments, shape: Shape) -> anyhow::Result<()> {
    let batch = arguments.batch().unwrap_or(match shape {
        Shape::Default => RunConfig::default().data.batch_size as usize,
        Shape::Dense | Shape::E8t2 | Shape::Layer => 1,
    });
    let needed_bytes = arguments.needed(shape, Precision::F32, batch)?;
    let available_bytes = available_bytes();
    if let Some(available_bytes) = available_bytes.filter(|&available| available < needed_bytes) {
        bail!(NoRoom(format!(
            "{} with a batch of {batch} needs about {} of memory, and {} are available; --layers, --context and \
             --batch make it smaller",
            shape.name(),
            bytes_text(needed_bytes),
            bytes_text(available_bytes)
        )));
    }
    announce(shape, batch, needed_bytes, available_bytes);
    let measured = step(arguments, shape, batch, TimedCpu::default())?;
    let device = "one core of the CPU".to_owned();
    let peak = arguments.peak.map(given);
    tell(arguments, shape, batch, (device, Precision::F32), peak, needed_bytes, &measured)
}

fn on_gpu(arguments: &Arguments, shape: Shape, cuda: Cuda) -> anyhow::Result<()> {
    let (precision, free_bytes) = (cuda.precision(), cuda.free_bytes()?);
    let needed = |batch: usize| {
        arguments.needed(shape, precision, batch).map(|needed| needed.saturating_add(RESERVE_BYTES))
    };
    let fits = |batch: usize| needed(batch).is_ok_and(|needed| needed <= free_bytes);
    let largest = || (1..=BATCH_MAX).take_while(|&batch| fits(batch)).last();
    let batch = match (arguments.batch(), shape) {
        (Some(batch), _) => batch,
        (None, Shape::Layer) => LAYER_BATCH,
        (None, _) => largest().unwrap_or(1),
    };
    let needed_bytes = needed(batch)?;
    if needed_bytes > free_bytes {
        let remedy = largest()
            .map_or("no batch would fit; a smaller --context needs less".to_owned(), |largest| {
                format!("--batch {largest} would fit")
            });
        bail!(NoRoom(format!(
            "{} with a batch of {batch} needs about {} of the GPU's memory, and {} are free; {remedy}",
            shape.name(),
            bytes_text(needed_bytes),
            bytes_text(free_bytes)
        )));
    }
    let device = cuda.properties().name.clone();
    let peak = arguments.peak.map(given).or_else(|| known_peak(&device, precision));
    announce(shape, batch, needed_bytes, Some(free_bytes));
    let measured = step(arguments, shape, batch, cuda)
        .map_err(|error| with_a_batch_to_try(error, batch, |batch| needed(batch).ok()))?;
    tell(arguments, shape, batch, (device, precision), peak, needed_bytes, &measured)
}

/// Memory that ran out although the estimate says that it does not, with a batch to try.
fn with_a_batch_to_try(
    error: anyhow::Error,
    batch: usize,
    needed: impl Fn(usize) -> Option<usize>,
) -> anyhow::Error {
    let Some(CudaError::OutOfMemory { asked, .. }) = ran_out(&error) else { return error };
    match smaller_batch(batch, asked.unwrap_or(0), needed) {
        Some((batch, less_bytes)) => {
            NoRoom(format!("{error:#}; --batch {batch} needs about {} less", bytes_text(less_bytes))).into()
        }
        None => NoRoom(format!("{error:#}")).into(),
    }
}

/// Memory that the host has for more, in bytes, where the system says so.
fn available_bytes() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// Says what is about to be done; nobody is left to tell when standard error is closed.
fn announce(shape: Shape, batch: usize, needed_bytes: usize, free_bytes: Option<usize>) {
    let free = free_bytes.map_or(String::new(), |free| format!(", of {} free", bytes_text(free)));
    let name = shape.name();
    let _ = writeln!(
        std::io::stderr(),
        "{name}: a batch of {batch} takes about {}{free}",
        bytes_text(needed_bytes)
    );
}

fn step<K: Clocked>(
    arguments: &Arguments,
    shape: Shape,
    batch: usize,
    kernels: K,
) -> anyhow::Result<Measured> {
    let steps = u64::from(arguments.steps);
    match arguments.config(shape) {
        Some(config) => measure_model(kernels, &config, batch, steps),
        None => measure_layer(kernels, expert_layer(batch * arguments.context(shape)), steps),
    }
}

fn tell(
    arguments: &Arguments,
    shape: Shape,
    batch: usize,
    (device, precision): (String, Precision),
    peak: Option<Peak>,
    needed_bytes: usize,
    measured: &Measured,
) -> anyhow::Result<()> {
    let context = arguments.context(shape);
    let tokens = batch * context;
    let config = arguments.config(shape);
    let parameters = config.as_ref().map(|config| config.layout().map(|layout| layout.len())).transpose()?;
    let (what, flops) = match (&config, parameters) {
        (Some(config), Some(parameters)) => {
            let flops = |causal| 3.0 * tokens as f64 * forward_flops_per_token(config, context, causal);
            (format!("{parameters} parameters, batch {batch} × {context}"), (flops(true), flops(false)))
        }
        _ => {
            let layer = expert_layer(tokens);
            let what = format!(
                "{} × {}, {} experts, top-{}",
                layer.hidden_size, layer.intermediate_size, layer.experts, layer.top_k
            );
            (what, (layer.flops(), layer.flops()))
        }
    };
    let precision = precision.to_string();
    let report = Report {
        shape: shape.name(),
        what,
        device,
        precision,
        batch,
        context,
        layers: config.map(|config| config.layers),
        parameters,
        flops,
        peak,
        needed_bytes,
        measured,
    };
    if arguments.json { say(&format!("{}\n", report.json())) } else { say(&format!("{}\n", report.text())) }
}

fn given(tflops: f64) -> Peak {
    Peak { flops: tflops * 1e12, source: "--peak" }
}

/// Dense FLOP/s of the tensor cores (of the plain ones for float32), by NVIDIA's data sheets.
fn known_peak(name: &str, precision: Precision) -> Option<Peak> {
    let (bf16, f32) = match name {
        // A part of a GPU, and cards with the chip of another that run at other clocks.
        name if name.contains("MIG") || name.contains("NVL") => return None,
        name if name.contains("H100 PCIe") => (756.0, 51.0),
        name if name.contains("H100") || name.contains("H200") || name.contains("GH200") => (989.4, 67.0),
        name if name.contains("A100") => (312.0, 19.5),
        _ => return None,
    };
    let tflops = match precision {
        Precision::Bf16 => bf16,
        Precision::Tf32 => bf16 / 2.0,
        Precision::F32 => f32,
    };
    Some(Peak { flops: tflops * 1e12, source: "NVIDIA's data sheet" })
}

#[cfg(test)]
mod tests {
    use sanderling_worker::model::ModelError;

    use super::*;

    #[test]
    fn memory_that_ran_out_is_told_with_a_batch_to_try() {
        let ran_out = || CudaError::OutOfMemory {
            operation: "a buffer",
            asked: Some(3_000_000),
            free: 1_000_000,
            total: 9_000_000,
        };
        let needed = |batch| Some(1_000_000 * batch);
        let told = |error: anyhow::Error, batch| with_a_batch_to_try(error, batch, needed).to_string();
        assert!(told(ran_out().into(), 16).ends_with("are free; --batch 8 needs about 8.0 MB less"));
        let in_model = ModelError::Device(Box::new(ran_out()));
        let told_of_model = told(in_model.into(), 4);
        assert!(told_of_model.ends_with("; --batch 1 needs about 3.0 MB less"), "{told_of_model}");
        assert!(told_of_model.contains("the GPU has no 3.0 MB more of memory"), "{told_of_model}");
        assert_eq!(told(ran_out().into(), 1), ran_out().to_string());
        assert_eq!(told(anyhow::anyhow!("something else"), 16), "something else");
    }

    #[test]
    fn peaks_are_known_of_some_cards() {
        let peak = |name, precision| known_peak(name, precision).map(|peak| peak.flops / 1e12);
        assert_eq!(peak("NVIDIA H200", Precision::Bf16), Some(989.4));
        assert_eq!(peak("NVIDIA H100 PCIe", Precision::Tf32), Some(378.0));
        assert_eq!(peak("NVIDIA A100-SXM4-80GB", Precision::F32), Some(19.5));
        for unknown in
            ["NVIDIA GeForce RTX 4090", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA H200 MIG 1g.18gb"]
        {
            assert_eq!(peak(unknown, Precision::Bf16), None);
        }
    }
}
