//! Steps that are queued as graphs come to the bits of those whose operations are queued one by one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use ndarray::{Array2, s};
use sanderling_common::capacity::{Capacity, CapacityConvention};
use sanderling_worker::kernels::cuda::{Cuda, Emulated, GraphCounts, Precision};
use sanderling_worker::kernels::{Kernels, Weights, Write};
use sanderling_worker::model::{Balancing, Model};

use crate::device::{Place, everywhere, kernels};
use crate::driver::is_stood_in_for;
use crate::fixture::Fixture;

/// What a step or an evaluation comes to.
#[derive(Debug, PartialEq)]
struct Seen {
    loss_bits: u64,
    gradient_bits: Vec<u32>,
}

/// A model in training, and what it sees.
struct Course {
    model: Model<Cuda>,
    fixture: Fixture,
    params: Box<<Cuda as Kernels>::Buffer>,
    grad: Box<<Cuda as Kernels>::Buffer>,
    ids: Array2<u32>,
    seen: Vec<Seen>,
}

impl Course {
    fn new(name: &'static str, mut kernels: Cuda) -> Self {
        let fixture = Fixture::load(name);
        let mut params = kernels.allocate_factors(fixture.params.len()).unwrap();
        kernels.upload(&fixture.params, &mut params);
        let grad = kernels.allocate(fixture.params.len()).unwrap();
        let model = Model::new(fixture.config.clone(), kernels).unwrap();
        let ids = fixture.input_ids();
        Self { model, fixture, params, grad, ids, seen: Vec::new() }
    }

    /// A step on the first tokens of every sequence.
    fn step(&mut self, tokens: usize, balancing: Balancing) {
        let (inputs, targets) = (self.ids.slice(s![.., ..tokens]), self.ids.slice(s![.., 1..=tokens]));
        let step =
            self.model.loss_and_grad(&self.params, inputs, targets, balancing, &mut self.grad).unwrap();
        let mut gradient = vec![f32::NAN; self.fixture.params.len()];
        self.model.kernels_mut().download(&self.grad, &mut gradient).unwrap();
        let gradient_bits = gradient.iter().map(|value| value.to_bits()).collect();
        let loss = step.cross_entropy + step.auxiliary + step.dropped;
        self.seen.push(Seen { loss_bits: loss.to_bits(), gradient_bits });
    }

    fn evaluate(&mut self, tokens: usize) {
        let (inputs, targets) = (self.ids.slice(s![.., ..tokens]), self.ids.slice(s![.., 1..=tokens]));
        let sums = self.model.evaluate(&self.params, inputs, targets).unwrap();
        let gradient_bits = Vec::new();
        self.seen.push(Seen { loss_bits: sums.loss().to_bits(), gradient_bits });
    }

    /// Other tokens in the same places, and other parameters.
    fn turn(&mut self) {
        let last = self.fixture.config.vocab_size as u32 - 1;
        self.ids.mapv_inplace(|id| last - id);
        self.fixture.params.iter_mut().for_each(|value| *value *= 0.9);
        self.model.kernels_mut().upload(&self.fixture.params, &mut self.params);
    }

    fn counts(&mut self) -> GraphCounts {
        let kernels = self.model.kernels_mut();
        if let Some(refusal) = kernels.graph_refusal() {
            println!("a graph was refused: {refusal}");
        }
        kernels.graph_counts()
    }

    /// Everything that could make what is queued differ from what was queued before.
    fn run(&mut self) -> GraphCounts {
        let all = self.ids.ncols() - 1;
        let plain = Balancing::default();
        let half = Capacity { factor: 0.5, convention: CapacityConvention::Slots };
        let limited = Balancing { auxiliary: 0.5, capacity: Some(half) };
        for _ in 0..3 {
            self.step(all, plain);
            self.turn();
        }
        for _ in 0..3 {
            self.evaluate(all - 2);
            self.step(all, limited);
            self.turn();
            self.step(all, plain);
        }
        self.step(all - 1, plain);
        self.counts()
    }
}

fn steps_by_graphs_are_steps_one_by_one(place: Place, precision: Precision) {
    // The emulator is slow.
    let names: &[_] = match place {
        Place::Gpu if !is_stood_in_for() => &["llama-gqa", "mixtral-e8t2", "qwen2moe-e16t4"],
        _ => &["mixtral-e8t2"],
    };
    for name in names {
        let (Some(cuda), Some(mut alone)) = (kernels(place, precision), kernels(place, precision)) else {
            return;
        };
        alone.leave_out_graphs();
        let (mut course, mut expected) = (Course::new(name, cuda), Course::new(name, alone));
        let counts = course.run();
        assert_eq!(expected.run(), GraphCounts::default());
        assert!(course.seen == expected.seen, "{name}: other bits, {counts:?}");
        println!("{name}: {counts:?}");
        assert!(counts.made >= 2 && counts.queued >= 3, "{name}: {counts:?}");
    }
}

/// A step of which no graph is made is queued one by one, and a device that makes none is asked three times.
#[test]
fn refused_graphs_are_done_without() {
    let refusing = |graphs_refused| {
        Cuda::emulated_as(Precision::F32, Emulated { graphs_refused, ..Emulated::default() })
    };
    let Some(mut alone) = kernels(Place::Emulator, Precision::F32) else { return };
    alone.leave_out_graphs();
    let mut expected = Course::new("llama-gqa", alone);
    let all = expected.ids.ncols() - 1;
    (0..6).for_each(|_| expected.step(all, Balancing::default()));
    for (refused, counts) in [
        (1, GraphCounts { made: 1, queued: 3, refused: 1 }),
        (3, GraphCounts { refused: 3, ..GraphCounts::default() }),
    ] {
        let mut course = Course::new("llama-gqa", refusing(refused).unwrap());
        (0..6).for_each(|_| course.step(all, Balancing::default()));
        assert!(course.seen == expected.seen, "{refused} refused");
        assert_eq!(course.counts(), counts, "{refused} refused");
        assert!(course.model.kernels_mut().graph_refusal().is_some());
    }
}

/// More shapes than graphs are kept for.
fn many_shapes(place: Place, precision: Precision) {
    let (Some(cuda), Some(mut alone)) = (kernels(place, precision), kernels(place, precision)) else {
        return;
    };
    alone.leave_out_graphs();
    let (mut course, mut expected) = (Course::new("mixtral-e8t2", cuda), Course::new("mixtral-e8t2", alone));
    for course in [&mut course, &mut expected] {
        // The largest first, so that memory is taken once.
        for tokens in (1..=10).rev() {
            for _ in 0..3 {
                course.step(tokens, Balancing::default());
            }
        }
    }
    let counts = course.counts();
    assert!(course.seen == expected.seen, "other bits, {counts:?}");
    assert!(counts.made + counts.refused >= 9 && counts.queued >= counts.made, "{counts:?}");
}

fn multiply(mut cuda: Cuda) {
    let weights = Weights { offset: 0, outputs: 8, inputs: 16 };
    let params = cuda.allocate_factors(weights.range().end).unwrap();
    let [x, mut y] = [4 * 16, 4 * 8].map(|len| cuda.allocate_activations(len).unwrap());
    cuda.product(&params, weights, 4, &x, &mut y, Write::Replace);
    cuda.wait().unwrap();
}

/// Graphs of one thread between the products of others, while devices are opened and closed.
fn threads_come_to_the_same(place: Place, precision: Precision) {
    let Some(cuda) = kernels(place, precision) else { return };
    let (threads, rounds) = if is_stood_in_for() { (3, 1) } else { (8, 20) };
    let run = |mut cuda: Cuda, graphs: bool| {
        if !graphs {
            cuda.leave_out_graphs();
        }
        let mut course = Course::new("mixtral-e8t2", cuda);
        let counts = (0..rounds).map(|_| course.run()).last().unwrap();
        // Opening and closing beside them must not spoil the recording of any.
        assert!((counts.queued > 0, counts.refused) == (graphs, 0), "{counts:?}");
        course.seen
    };
    let alone = run(cuda.beside(), false);
    let done = &AtomicBool::new(false);
    thread::scope(|scope| {
        let (run, cuda) = (&run, &cuda);
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                // Opened, with a product, for which cuBLASLt loads what it needs, and closed.
                multiply(kernels(place, precision).unwrap());
            }
        });
        let threads: Vec<_> =
            (0..threads).map(|number| scope.spawn(move || run(cuda.beside(), number % 3 != 0))).collect();
        let seen: Vec<_> = threads.into_iter().map(thread::ScopedJoinHandle::join).collect();
        done.store(true, Ordering::Relaxed);
        for seen in seen {
            assert!(seen.unwrap() == alone, "a thread came to something else beside others");
        }
    });
}

everywhere!(steps_by_graphs_are_steps_one_by_one, many_shapes);
// The emulator does one thing at a time.
everywhere! { gpu_shared Gpu: threads_come_to_the_same }
