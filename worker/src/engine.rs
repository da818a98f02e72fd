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
use crate::kernels::cpu::Cpu;
use crate::model::{Balancing, EvalSums, Model, ModelError, StepLoss};

/// What a worker computes with: an [`Engine`], or what measurements put in its place.
pub trait Compute: Send {
    /// The layout of the parameters.
    fn layout(&self) -> &Arc<Layout>;

    /// The tokens of a batch.
    fn batch(&self, id: BatchId) -> Batch;

    /// Takes the gradient of a batch at `parameters`; [`gradient`](Self::gradient) holds it afterwards.
    ///
    /// # Errors
    /// A [`ModelError`] if the device fails.
    fn take_gradient(&mut self, parameters: &[f32], batch: &Batch) -> Result<StepLoss, ModelError>;

    /// The last gradient taken.
    fn gradient(&self) -> &[f32];

    /// The loss of `parameters` over the whole of a held-out split, for as long as `keep_going` says so, which is asked
    /// before every batch; `None` if it said no.
    ///
    /// # Errors
    /// A [`ModelError`] if the device fails.
    fn evaluate_while(
        &mut self,
        parameters: &[f32],
        job: EvaluationJob,
        keep_going: &dyn Fn() -> bool,
    ) -> Result<Option<EvaluationReport>, ModelError>;
}

/// The model of a run with its data, ready to take gradients and to evaluate.
pub struct Engine {
    model: Model<Cpu>,
    corpus: Arc<Corpus>,
    layout: Arc<Layout>,
    run: RunConfig,
    gradient: Vec<f32>,
}

impl Engine {
    /// The model of a run, with its text.
    ///
    /// # Errors
    /// A [`ModelError`] if the configuration makes no model.
    pub fn new(run: &RunConfig, config: ModelConfig, corpus: Arc<Corpus>) -> Result<Self, ModelError> {
        let layout = Arc::new(config.layout()?);
        let gradient = vec![0.0; layout.len()];
        Ok(Self { model: Model::new(config, Cpu::default())?, corpus, layout, run: run.clone(), gradient })
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
    pub fn take_gradient(&mut self, parameters: &[f32], batch: &Batch) -> Result<StepLoss, ModelError> {
        let (inputs, targets) = (batch.inputs.view(), batch.targets.view());
        let balancing = Balancing { auxiliary: self.run.model.aux_loss, capacity: self.run.capacity() };
        self.model.loss_and_grad(parameters, inputs, targets, balancing, &mut self.gradient)
    }

    /// The last gradient taken.
    pub fn gradient(&self) -> &[f32] {
        &self.gradient
    }

    /// The loss of `parameters` over the whole of a held-out split, in non-overlapping windows.
    ///
    /// # Errors
    /// A [`ModelError`] if the device fails.
    pub fn evaluate(
        &mut self,
        parameters: &[f32],
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
        parameters: &[f32],
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

impl Compute for Engine {
    fn layout(&self) -> &Arc<Layout> {
        self.layout()
    }

    fn batch(&self, id: BatchId) -> Batch {
        self.batch(id)
    }

    fn take_gradient(&mut self, parameters: &[f32], batch: &Batch) -> Result<StepLoss, ModelError> {
        self.take_gradient(parameters, batch)
    }

    fn gradient(&self) -> &[f32] {
        self.gradient()
    }

    fn evaluate_while(
        &mut self,
        parameters: &[f32],
        job: EvaluationJob,
        keep_going: &dyn Fn() -> bool,
    ) -> Result<Option<EvaluationReport>, ModelError> {
        self.evaluate_while(parameters, job, keep_going)
    }
}
