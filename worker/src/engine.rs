//! What computes: the model, the text and the buffers of one worker.

use std::sync::Arc;

use sanderling_common::config::RunConfig;
use sanderling_common::corpus::Corpus;
use sanderling_common::ids::BatchId;
use sanderling_common::layout::Layout;
use sanderling_common::model_config::ModelConfig;
use sanderling_common::wire::EvaluationJob;
use sanderling_common::wire::control::EvaluationReport;

use crate::data::{Batch, evaluation_batches, training_batch};
use crate::kernels::Kernels;
use crate::kernels::cpu::Cpu;
use crate::model::{Balancing, EvalSums, Model, ModelError, StepLoss};

/// What a worker computes with: an [`Engine`], or what measurements put in its place.
pub trait Compute: Send {
    /// Parameters, or their gradient, where it computes: `[f32]` on the host.
    type Vector: ?Sized;

    /// The layout of the parameters.
    fn layout(&self) -> &Arc<Layout>;

    /// The tokens of a batch.
    fn batch(&self, id: BatchId) -> Batch;

    /// Takes the gradient of a batch at `parameters`; [`gradient`](Self::gradient) holds it afterwards.
    ///
    /// # Errors
    /// A [`ModelError`] if the device fails.
    fn take_gradient(&mut self, parameters: &Self::Vector, batch: &Batch) -> Result<StepLoss, ModelError>;

    /// The last gradient taken.
    fn gradient(&self) -> &Self::Vector;

    /// The loss of `parameters` over the whole of a held-out split, for as long as `keep_going` says so, which is asked
    /// before every batch; `None` if it said no.
    ///
    /// # Errors
    /// A [`ModelError`] if the device fails.
    fn evaluate_while(
        &mut self,
        parameters: &Self::Vector,
        job: EvaluationJob,
        keep_going: &dyn Fn() -> bool,
    ) -> Result<Option<EvaluationReport>, ModelError>;

    /// A failure of the place where it computes, of its own or of what it shares the place with, as people are to be told: what
    /// computes may know more of it.
    fn explained(&self, error: ModelError) -> ModelError {
        error
    }
}

impl<C: Compute + ?Sized> Compute for Box<C> {
    type Vector = C::Vector;

    fn layout(&self) -> &Arc<Layout> {
        (**self).layout()
    }

    fn batch(&self, id: BatchId) -> Batch {
        (**self).batch(id)
    }

    fn take_gradient(&mut self, parameters: &C::Vector, batch: &Batch) -> Result<StepLoss, ModelError> {
        (**self).take_gradient(parameters, batch)
    }

    fn gradient(&self) -> &C::Vector {
        (**self).gradient()
    }

    fn evaluate_while(
        &mut self,
        parameters: &C::Vector,
        job: EvaluationJob,
        keep_going: &dyn Fn() -> bool,
    ) -> Result<Option<EvaluationReport>, ModelError> {
        (**self).evaluate_while(parameters, job, keep_going)
    }

    fn explained(&self, error: ModelError) -> ModelError {
        (**self).explained(error)
    }
}

/// The model of a run with its data, ready to take gradients and to evaluate. Parameters and gradient are where the kernels
/// compute.
pub struct Engine<K: Kernels = Cpu> {
    model: Model<K>,
    corpus: Arc<Corpus>,
    layout: Arc<Layout>,
    run: RunConfig,
    gradient: K::Storage,
}

impl Engine {
    /// The model of a run, with its text, on the CPU.
    ///
    /// # Errors
    /// A [`ModelError`] if the configuration makes no model.
    pub fn new(run: &RunConfig, config: ModelConfig, corpus: Arc<Corpus>) -> Result<Self, ModelError> {
        Self::with(Cpu::default(), run, config, corpus)
    }
}

impl<K: Kernels> Engine<K> {
    /// The model of a run, with its text, where `kernels` compute.
    ///
    /// # Errors
    /// A [`ModelError`] if the configuration makes no model, or the device fails.
    pub fn with(
        mut kernels: K,
        run: &RunConfig,
        config: ModelConfig,
        corpus: Arc<Corpus>,
    ) -> Result<Self, ModelError> {
        let layout = Arc::new(config.layout()?);
        let gradient = kernels.allocate(layout.len()).map_err(ModelError::device)?;
        Ok(Self { model: Model::new(config, kernels)?, corpus, layout, run: run.clone(), gradient })
    }

    /// Takes the memory of a training step now, not with the first batch.
    ///
    /// # Errors
    /// A [`ModelError`] if the device has not that much.
    pub fn make_room(&mut self) -> Result<(), ModelError> {
        self.model.make_room(self.run.data.batch_size as usize * self.run.model.context)
    }

    /// The layout of its parameters.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The tokens of a batch.
    pub fn batch(&self, id: BatchId) -> Batch {
        let sequences = self.run.data.batch_size as usize;
        training_batch(&self.corpus.training(), self.run.run.seed, id, sequences, self.run.model.context)
    }

    /// Takes the gradient of a batch at `parameters`; [`gradient`](Self::gradient) holds it afterwards.
    ///
    /// # Errors
    /// A [`ModelError`] if the device fails.
    pub fn take_gradient(&mut self, parameters: &K::Buffer, batch: &Batch) -> Result<StepLoss, ModelError> {
        let (inputs, targets) = (batch.inputs.view(), batch.targets.view());
        let balancing = Balancing { auxiliary: self.run.model.aux_loss, capacity: self.run.capacity() };
        self.model.loss_and_grad(parameters, inputs, targets, balancing, &mut self.gradient)
    }

    /// The last gradient taken.
    pub fn gradient(&self) -> &K::Buffer {
        &self.gradient
    }

    /// The loss of `parameters` over the whole of a held-out split, in non-overlapping windows.
    ///
    /// # Errors
    /// A [`ModelError`] if the device fails.
    pub fn evaluate(
        &mut self,
        parameters: &K::Buffer,
        job: EvaluationJob,
    ) -> Result<EvaluationReport, ModelError> {
        Ok(self.evaluate_while(parameters, job, &|| true)?.expect("it went on to the end"))
    }

    /// As [`evaluate`](Self::evaluate), for as long as `keep_going` says so, which is asked before every batch; `None` if
    /// it said no.
    ///
    /// # Errors
    /// A [`ModelError`] if the device fails.
    pub fn evaluate_while(
        &mut self,
        parameters: &K::Buffer,
        job: EvaluationJob,
        keep_going: &dyn Fn() -> bool,
    ) -> Result<Option<EvaluationReport>, ModelError> {
        let text = self.corpus.held_out(job.split);
        let sequences = self.run.data.batch_size as usize;
        let mut sums = EvalSums::default();
        for batch in evaluation_batches(&text, sequences, self.run.model.context) {
            if !keep_going() {
                return Ok(None);
            }
            sums.merge(&self.model.evaluate(parameters, batch.inputs.view(), batch.targets.view())?);
        }
        let share = |layer: &crate::model::RouterSums| {
            let counts = &layer.statistics.expert_tokens;
            let slots = counts.iter().sum::<u64>().max(1) as f64;
            counts.iter().map(|&count| (count as f64 / slots) as f32).collect()
        };
        Ok(Some(EvaluationReport {
            job,
            loss: sums.loss(),
            tokens: sums.tokens,
            expert_share: sums.layers.iter().map(share).collect(),
            router_entropy: (sums.layers.iter())
                .map(|layer| (layer.entropy_sum / sums.tokens as f64) as f32)
                .collect(),
        }))
    }
}

impl<K> Compute for Engine<K>
where
    K: Kernels + Send,
    K::Storage: Send,
    K::Tokens: Send,
    K::Routing: Send,
{
    type Vector = K::Buffer;

    fn layout(&self) -> &Arc<Layout> {
        self.layout()
    }

    fn batch(&self, id: BatchId) -> Batch {
        self.batch(id)
    }

    fn take_gradient(&mut self, parameters: &K::Buffer, batch: &Batch) -> Result<StepLoss, ModelError> {
        self.take_gradient(parameters, batch)
    }

    fn gradient(&self) -> &K::Buffer {
        self.gradient()
    }

    fn evaluate_while(
        &mut self,
        parameters: &K::Buffer,
        job: EvaluationJob,
        keep_going: &dyn Fn() -> bool,
    ) -> Result<Option<EvaluationReport>, ModelError> {
        self.evaluate_while(parameters, job, keep_going)
    }
}
