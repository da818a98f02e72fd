//! The decoder on a text, as workers train it.

use std::sync::Arc;

use sanderling_common::config::RunConfig;
use sanderling_common::corpus::Corpus;
use sanderling_common::ids::{BatchId, Step};
use sanderling_common::init::initial_parameters;
use sanderling_common::layout::Layout;
use sanderling_common::model_config::ModelConfig;
use sanderling_common::wire::{EvaluationJob, Split};
use sanderling_worker::engine::Engine;
use sanderling_worker::model::ModelError;

use super::{Score, Taken, Task};

/// A worker's [`Engine`] with the parameters that it starts from.
pub struct LanguageTask {
    engine: Engine,
    initial: Arc<[f32]>,
}

impl LanguageTask {
    /// Starts from the run's seed.
    ///
    /// # Errors
    /// A [`ModelError`] if the configuration makes no model.
    pub fn new(run: &RunConfig, corpus: Arc<Corpus>) -> Result<Self, ModelError> {
        let config = run.model_config(corpus.vocabulary().len());
        let initial = initial_parameters(&config, run.run.seed)?;
        Self::from_parameters(run, corpus, config, initial.into())
    }

    /// Starts from a model that there is already.
    ///
    /// # Errors
    /// A [`ModelError`] if the configuration makes no model.
    ///
    /// # Panics
    /// If the parameters are not of the model's layout.
    pub fn from_parameters(
        run: &RunConfig,
        corpus: Arc<Corpus>,
        config: ModelConfig,
        initial: Arc<[f32]>,
    ) -> Result<Self, ModelError> {
        let engine = Engine::new(run, config, corpus)?;
        assert_eq!(initial.len(), engine.layout().len(), "the parameters are of another layout");
        Ok(Self { engine, initial })
    }
}

impl Task for LanguageTask {
    fn layout(&self) -> &Arc<Layout> {
        self.engine.layout()
    }

    fn initial(&self) -> Vec<f32> {
        self.initial.to_vec()
    }

    fn take_gradient(&mut self, parameters: &[f32], batch: BatchId) -> Result<Taken, ModelError> {
        let batch = self.engine.batch(batch);
        let loss = self.engine.take_gradient(parameters, &batch)?;
        let samples = u32::try_from(batch.tokens()).expect("the configuration bounds a batch");
        Ok(Taken { loss: loss.cross_entropy, dropped: loss.dropped, samples })
    }

    fn gradient(&self) -> &[f32] {
        self.engine.gradient()
    }

    fn evaluate(&mut self, parameters: &[f32], split: Split) -> Result<Score, ModelError> {
        let job = EvaluationJob { id: 0, step: Step(0), split };
        Ok(Score { loss: self.engine.evaluate(parameters, job)?.loss, accuracy: None })
    }
}
