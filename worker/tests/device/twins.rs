//! Two workers that live through the same, one of them on a device.

use std::sync::Arc;

use proptest::prelude::*;
use sanderling_common::ids::{BatchId, SessionId, Step};
use sanderling_common::init::{Purpose, normal_pair, stream};
use sanderling_common::layout::Layout;
use sanderling_common::method::{Decay, Method, MethodSettings, RateScaling};
use sanderling_common::schedule::Schedule;
use sanderling_common::sparse::{Compression, Compressor, ValueFormat, join_aside};
use sanderling_common::wire::{Answer, BatchRange, Push, Work};
use sanderling_worker::core::replica::HostReplica;
use sanderling_worker::core::{RestoredWorker, WorkerCore, WorkerImage, WorkerSettings};
use sanderling_worker::device::DeviceReplica;
use sanderling_worker::kernels::method::MethodKernels;

const FORMATS: [ValueFormat; 4] = [ValueFormat::F32, ValueFormat::Bf16, ValueFormat::Int8, ValueFormat::Sign];

/// The gradient of this batch cannot be used, though that of a local step before it can.
const BAD_BATCH: u64 = 3;

/// Of this one it is the other way round.
const BAD_LOCAL_BATCH: u64 = 5;

/// What two workers live through.
#[derive(Clone, Debug)]
pub(crate) struct Course {
    pub(crate) lens: Vec<usize>,
    pub(crate) method: MethodSettings,
    /// The share of a worker's own progress that the others see, at most 1; 0 as well.
    pub(crate) share: f64,
    pub(crate) exchanges: u64,
    /// Gradients are taken while a push is pending.
    pub(crate) overlap: bool,
    /// Gradients with few distinct entries, so that ties are the rule.
    pub(crate) ties: bool,
    pub(crate) seed: u64,
}

impl Course {
    fn of(method: Method, format: ValueFormat) -> Self {
        let compression = Compression { keep: 0.05, dense_below: 8, format };
        let method = MethodSettings {
            method,
            momentum: 0.7,
            beta2: 0.9,
            epsilon: 1e-8,
            weight_decay: 0.01,
            clip_norm: 1.0,
            compression,
        };
        let lens = vec![300, 7, 1, 33, 2100];
        Self { lens, method, share: 0.25, exchanges: 6, overlap: true, ties: false, seed: 1 }
    }

    /// Tensors of several spans of a kernel, and ties across them; few kinds, as emulated kernels take their time.
    pub(crate) fn long() -> impl Iterator<Item = Self> {
        [Method::Dgs, Method::DgcAsync, Method::DgsAdam].into_iter().map(|method| {
            let course = Self::of(method, ValueFormat::Int8);
            let ties = method != Method::DgsAdam;
            Self { lens: vec![150_001, 9, 20_000], exchanges: 2, ties, ..course }
        })
    }

    /// As many elements as a model has, for devices that are fast.
    pub(crate) fn large() -> Self {
        let course = Self::of(Method::DgsAdam, ValueFormat::Int8);
        let mut course = Self { lens: vec![8_388_608, 2_000, 3_000_001], exchanges: 3, ..course };
        course.method.compression.keep = 0.01;
        course
    }

    /// One of every method and format; every one comes with and without what is on or off.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let kinds = Method::ALL.into_iter().flat_map(|method| FORMATS.map(|format| (method, format)));
        kinds.flat_map(|(method, format)| {
            let on = Self::of(method, format);
            let mut off = Self { share: 1.0, overlap: false, ties: true, ..on.clone() };
            (off.method.weight_decay, off.method.clip_norm) = (0.0, 0.0);
            let mut still = Self { share: 0.0, ..on.clone() };
            still.method.compression.dense_below = 0;
            [on, off, still]
        })
    }
}

/// Any.
pub(crate) fn course() -> impl Strategy<Value = Course> {
    let kinds = (prop::sample::select(&Method::ALL[..]), prop::sample::select(&FORMATS[..]));
    let lens = prop::collection::vec(prop_oneof![1_usize..70, 500_usize..3000], 1..6);
    let compression = (prop_oneof![Just(1.0), 0.001..=1.0], prop::sample::select(vec![0, 20, 1000]));
    let rates = (prop::sample::select(vec![0.0, 0.125, 0.3, 1.0]), any::<bool>(), any::<bool>());
    let rest = (1_u64..7, any::<bool>(), any::<bool>(), any::<u64>());
    (kinds, lens, compression, rates, rest).prop_map(
        |(
            (method, format),
            lens,
            (keep, dense_below),
            (share, decays, clips),
            (exchanges, overlap, ties, seed),
        )| {
            let mut course = Course::of(method, format);
            course.method.compression = Compression { keep, dense_below, format };
            if !decays {
                course.method.weight_decay = 0.0;
            }
            if !clips {
                course.method.clip_norm = 0.0;
            }
            Course { lens, share, exchanges, overlap, ties, seed, ..course }
        },
    )
}

fn settings(course: &Course) -> WorkerSettings {
    // Only dgs-adam knows a rate of its own.
    let local_rate = if course.method.method == Method::DgsAdam { 0.02 } else { 0.0 };
    let rate = if course.method.method == Method::DgsAdam { 0.02 * course.share } else { 0.1 };
    let schedule = Schedule {
        learning_rate: rate,
        rate_scaling: RateScaling::Constant,
        learning_rate_max: rate,
        local_rate,
        warmup_steps: 0,
        warmup_exchanges: 0,
        decay: Decay::Cosine,
        total_steps: 1000,
        final_fraction: 0.1,
    };
    WorkerSettings { method: course.method, schedule, replica_check_every: 2 }
}

/// A gradient that depends on where it is taken.
fn gradient(course: &Course, batch: BatchId, view: &[f32]) -> Vec<f32> {
    let mut rng = stream(course.seed, Purpose::Batch, batch.0);
    let mut draw = || normal_pair(&mut rng).0 as f32;
    let mut gradient: Vec<f32> =
        view.iter().map(|theta| if course.ties { draw().round() } else { 0.1 * theta + draw() }).collect();
    if batch.0 == BAD_BATCH {
        let at = course.seed as usize % gradient.len();
        gradient[at] = f32::NAN;
    }
    gradient
}

/// Bytes of a difference as servers make them, with and without zeros.
fn difference(layout: &Layout, seed: u64, format: ValueFormat) -> Vec<u8> {
    let mut rng = stream(seed, Purpose::Simulation, 0);
    let keep = if seed.is_multiple_of(3) { 1.0 } else { 0.1 };
    let values: Vec<f32> = (0..layout.len())
        .map(|at| if at % 3 == 0 { 0.0 } else { 0.01 * normal_pair(&mut rng).0 as f32 })
        .collect();
    let mut payload = Vec::new();
    let mut compressor = match seed % 4 {
        0 => Compressor::nonzero(),
        _ => Compressor::without_zeros(Compression { keep, dense_below: 5, format }),
    };
    compressor.compress(layout, 0..layout.tensors().len(), &values, &mut payload).unwrap();
    payload
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// A worker on the host and one on a device.
struct Twins<D: MethodKernels, M: Fn() -> D> {
    layout: Arc<Layout>,
    settings: WorkerSettings,
    host: WorkerCore,
    device: WorkerCore<DeviceReplica<D>>,
    make: M,
    /// Puts gradients on the device, and takes views from it.
    hand: D,
    gradient: D::Storage,
}

/// Has both live through it, and compares everything that can be seen of them.
///
/// All kernels that `make` makes are of one device.
pub(crate) fn same_as_the_host<D: MethodKernels>(course: &Course, make: impl Fn() -> D) {
    let layout = course.lens.iter().enumerate().map(|(number, &len)| (format!("t{number}"), vec![len]));
    let layout = Arc::new(Layout::new(layout).unwrap());
    let mut rng = stream(course.seed, Purpose::Parameters, 0);
    let theta: Vec<f32> = (0..layout.len()).map(|_| normal_pair(&mut rng).0 as f32).collect();
    let settings = settings(course);
    let mut hand = make();
    let replica = DeviceReplica::new(make(), layout.clone(), &settings.method, &theta).unwrap();
    let mut twins = Twins {
        host: WorkerCore::new(layout.clone(), &settings, SessionId(1), theta, Step(0)),
        device: WorkerCore::with(replica, layout.clone(), &settings, SessionId(1), Step(0)),
        gradient: hand.allocate(layout.len()).unwrap(),
        hand,
        make,
        layout,
        settings,
    };
    let batches = Some(BatchRange { first: BatchId(0), count: course.exchanges as u32 + 1 });
    twins.host.add_work(&Work { batches, ..Work::default() }).unwrap();
    twins.device.add_work(&Work { batches, ..Work::default() }).unwrap();
    let mut taken = None;
    for exchange in 0..course.exchanges {
        let gradient = match taken.take() {
            Some(gradient) => gradient,
            None => {
                if exchange % 2 == 1 {
                    twins.take_local_step(course);
                }
                twins.take_gradient(course)
            }
        };
        twins.push(&gradient);
        twins.compare_images();
        if exchange == course.exchanges / 2 {
            twins.restart();
        }
        if course.overlap {
            taken = Some(twins.take_gradient(course));
        }
        twins.answer(course, exchange);
        twins.evaluate(course, exchange);
    }
    assert_eq!(twins.host.counters(), twins.device.counters());
    let local = !course.overlap && course.exchanges > BAD_LOCAL_BATCH;
    assert_eq!(twins.host.counters().skipped, u64::from(course.exchanges > BAD_BATCH) + u64::from(local));
}

impl<D: MethodKernels, M: Fn() -> D> Twins<D, M> {
    fn download(&mut self, what: impl FnOnce(&mut WorkerCore<DeviceReplica<D>>) -> &D::Buffer) -> Vec<f32> {
        let mut values = vec![0.0; self.layout.len()];
        self.hand.download(what(&mut self.device), 0, &mut values).unwrap();
        values
    }

    /// Of the next batch, or the one after that while a push is pending.
    fn take_gradient(&mut self, course: &Course) -> Vec<f32> {
        let view = self.download(|device| device.view());
        assert_eq!(bits(&view), bits(self.host.view()));
        gradient(course, self.host.next_batch().unwrap(), &view)
    }

    /// A step that both take by themselves, before the one whose gradient is pushed.
    fn take_local_step(&mut self, course: &Course) {
        let batch = self.host.next_batch().unwrap();
        let view = self.download(|device| device.view());
        assert_eq!(bits(&view), bits(self.host.view()));
        let mut gradient = gradient(course, BatchId(1000 + batch.0), &view);
        if batch.0 == BAD_LOCAL_BATCH {
            gradient[0] = f32::INFINITY;
        }
        self.hand.upload(&gradient, &mut self.gradient);
        let Ok(()) = self.host.handle_local_gradient(&gradient, 1.0);
        self.device.handle_local_gradient(&self.gradient, 1.0).unwrap();
    }

    fn push(&mut self, gradient: &[f32]) {
        let batch = self.host.next_batch().unwrap();
        self.hand.upload(gradient, &mut self.gradient);
        let expected = self.host.handle_gradient(batch, gradient, 1.0, 0.5, 9, 0).unwrap();
        let push = self.device.handle_gradient(batch, &self.gradient, 1.0, 0.5, 9, 0).unwrap();
        assert_eq!(push, expected);
        assert_eq!(push.skipped, batch.0 == BAD_BATCH);
    }

    /// Everything that is kept: the model and all accumulators.
    fn compare_images(&mut self) {
        let (kept, expected) = self.images();
        assert_eq!(kept.place, expected.place);
        assert_eq!(bits(&kept.theta), bits(&expected.theta));
        assert_eq!(kept.vectors.len(), expected.vectors.len());
        for (vector, expected) in kept.vectors.iter().zip(&expected.vectors) {
            assert_eq!(bits(vector), bits(expected));
        }
    }

    fn images(&mut self) -> (RestoredWorker, RestoredWorker) {
        let own = |image: WorkerImage<'_>| RestoredWorker {
            place: image.place,
            push: Push::clone(image.push),
            theta: image.theta.into_owned(),
            vectors: image.vectors.into_iter().map(|vector| vector.into_owned()).collect(),
        };
        let Ok(host) = self.host.image();
        (own(self.device.image().unwrap().unwrap()), own(host.unwrap()))
    }

    /// The one on the device goes on from what was written down.
    fn restart(&mut self) {
        let (kept, expected) = self.images();
        let (layout, method) = (self.layout.clone(), self.settings.method);
        let with = |theta: Vec<f32>| DeviceReplica::new((self.make)(), layout, &method, &theta);
        self.device =
            WorkerCore::restore_with(self.layout.clone(), &self.settings, kept.clone(), with).unwrap();
        // What the host keeps is of use to a device and the other way round.
        let layout = self.layout.clone();
        let with = |theta: Vec<f32>| Ok(HostReplica::new(layout, &method, theta));
        self.host = WorkerCore::restore_with(self.layout.clone(), &self.settings, kept, with).unwrap();
        assert_eq!(self.host.pending(), Some(&expected.push));
        assert_eq!(self.device.pending(), Some(&expected.push));
    }

    fn answer(&mut self, course: &Course, exchange: u64) {
        let payload =
            difference(&self.layout, course.seed.wrapping_add(exchange), course.method.compression.format);
        let seq = self.host.pending().unwrap().seq;
        let answer = Answer { seq, step: Step(exchange + 1), staleness: 0, work: Work::default(), payload };
        self.host.handle_answer(&answer).unwrap();
        self.device.handle_answer(&answer).unwrap();
    }

    /// The model of an evaluation, beside θ.
    fn evaluate(&mut self, course: &Course, exchange: u64) {
        let part = |number: u64| {
            let seed = course.seed.wrapping_mul(7).wrapping_add(2 * exchange + number);
            difference(&self.layout, seed, ValueFormat::Int8)
        };
        let payload = join_aside(&part(0), &part(1));
        let model = self.device.model_aside(&payload).unwrap();
        let mut values = vec![0.0; self.layout.len()];
        self.hand.download(&model, 0, &mut values).unwrap();
        let expected = self.host.model_aside(&payload).unwrap();
        assert_eq!(bits(&values), bits(&expected));
    }
}
