//! Handwritten digits of 8×8 pixels, compiled in; `assets/README.md` has their source and terms.

use std::sync::Arc;

use sanderling_common::ids::BatchId;
use sanderling_common::init::{Purpose, stream, uniform};
use sanderling_common::layout::Layout;
use sanderling_common::wire::Split;
use sanderling_worker::model::ModelError;

use super::{Classifier, ClassifierShape, Score, Taken, Task};

/// One digit a line: 64 pixels of 0 to 16, and which digit it is.
const CSV: &str = include_str!("../../assets/digits.csv");

/// Pixels of a digit.
const PIXELS: usize = 64;

/// The largest value of a pixel.
const PIXEL_MAX: f32 = 16.0;

/// How the digits are dealt into the splits: the same for every run, whatever its seed.
const DEAL_SEED: u64 = 0;

/// Of ten digits, so many are validated with, and as many tested with.
const HELD_OUT_OF_TEN: usize = 2;

/// Digits that are passed through the classifier at a time in an evaluation.
const EVALUATION_ROWS: usize = 128;

/// Some digits.
#[derive(Clone, Debug, PartialEq)]
pub struct Digits {
    /// (digits, 64), between 0 and 1.
    pub pixels: Vec<f32>,
    /// Which digit each is.
    pub classes: Vec<u32>,
}

impl Digits {
    /// All of them, in the order of the file.
    ///
    /// # Panics
    /// Never: a test reads the file.
    fn all() -> Self {
        let mut digits = Self { pixels: Vec::new(), classes: Vec::new() };
        for line in CSV.lines() {
            let (pixels, class) = line.rsplit_once(',').expect("a line has pixels and a digit");
            let pixel = |text: &str| text.parse::<f32>().expect("a pixel is a number") / PIXEL_MAX;
            digits.pixels.extend(pixels.split(',').map(pixel));
            digits.classes.push(class.parse().expect("a digit is a number"));
        }
        assert_eq!(digits.pixels.len(), digits.classes.len() * PIXELS, "every line has {PIXELS} pixels");
        digits
    }

    /// The digits at these places.
    fn select(&self, places: &[usize]) -> Self {
        let pixels = places.iter().flat_map(|&place| &self.pixels[place * PIXELS..][..PIXELS]);
        let classes = places.iter().map(|&place| self.classes[place]);
        Self { pixels: pixels.copied().collect(), classes: classes.collect() }
    }

    /// For training, validation and testing.
    fn dealt() -> [Self; 3] {
        let all = Self::all();
        let mut places: Vec<usize> = (0..all.classes.len()).collect();
        let mut rng = stream(DEAL_SEED, Purpose::Batch, 0);
        for last in (1..places.len()).rev() {
            places.swap(last, (uniform(&mut rng) * (last + 1) as f64) as usize);
        }
        let held_out = places.len() * HELD_OUT_OF_TEN / 10;
        let (validation, rest) = places.split_at(held_out);
        let (test, training) = rest.split_at(held_out);
        [training, validation, test].map(|places| all.select(places))
    }
}

/// Classifying digits with a small mixture of experts.
pub struct DigitsTask {
    classifier: Classifier,
    training: Digits,
    validation: Digits,
    test: Digits,
    seed: u64,
    batch_size: usize,
    auxiliary: f32,
    gradient: Vec<f32>,
}

impl DigitsTask {
    /// The classifier that the experiments train: 8 experts of which 2 are active, as in the default language model.
    pub const SHAPE: ClassifierShape = ClassifierShape {
        pixels: PIXELS,
        classes: 10,
        width: 64,
        layers: 2,
        experts: 8,
        top_k: 2,
        expert_width: 32,
    };

    /// With batches of `batch_size` digits, drawn with replacement, and the coefficient of the load-balancing loss.
    pub fn new(seed: u64, batch_size: usize, auxiliary: f32) -> Self {
        let classifier = Classifier::new(Self::SHAPE);
        let [training, validation, test] = Digits::dealt();
        let gradient = vec![0.0; classifier.layout().len()];
        Self { classifier, training, validation, test, seed, batch_size, auxiliary, gradient }
    }
}

impl Task for DigitsTask {
    fn layout(&self) -> &Arc<Layout> {
        self.classifier.layout()
    }

    fn initial(&self) -> Vec<f32> {
        self.classifier.initial(self.seed)
    }

    fn take_gradient(&mut self, parameters: &[f32], batch: BatchId) -> Result<Taken, ModelError> {
        let mut rng = stream(self.seed, Purpose::Batch, batch.0);
        let count = self.training.classes.len() as f64;
        let places: Vec<usize> = (0..self.batch_size).map(|_| (uniform(&mut rng) * count) as usize).collect();
        let Digits { pixels, classes } = self.training.select(&places);
        let (auxiliary, gradient) = (self.auxiliary, &mut self.gradient);
        let loss = self.classifier.loss_and_grad(parameters, &pixels, &classes, auxiliary, gradient);
        let samples = u32::try_from(classes.len()).expect("a batch is small");
        Ok(Taken { loss, dropped: 0.0, samples })
    }

    fn gradient(&self) -> &[f32] {
        &self.gradient
    }

    fn evaluate(&mut self, parameters: &[f32], split: Split) -> Result<Score, ModelError> {
        let digits = match split {
            Split::Validation => &self.validation,
            Split::Test => &self.test,
        };
        let (mut loss, mut right) = (0.0, 0);
        let batches =
            digits.pixels.chunks(EVALUATION_ROWS * PIXELS).zip(digits.classes.chunks(EVALUATION_ROWS));
        for (pixels, classes) in batches {
            let (sum, count) = self.classifier.evaluate(parameters, pixels, classes);
            (loss, right) = (loss + sum, right + count);
        }
        let count = digits.classes.len() as f64;
        Ok(Score { loss: loss / count, accuracy: Some(right as f64 / count) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_holds_what_its_source_says() {
        let all = Digits::all();
        assert_eq!(all.classes.len(), 1797);
        let counts = (0..10).map(|digit| all.classes.iter().filter(|&&class| class == digit).count());
        assert_eq!(counts.collect::<Vec<_>>(), [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
        assert!(all.pixels.iter().all(|pixel| (0.0..=1.0).contains(pixel)));
        assert_eq!(all.pixels[2], 5.0 / 16.0);
    }

    #[test]
    fn every_digit_is_in_one_split_and_every_split_has_all_classes() {
        let splits = Digits::dealt();
        assert_eq!(splits.each_ref().map(|split| split.classes.len()), [1079, 359, 359]);
        let mut dealt: Vec<_> = splits
            .iter()
            .flat_map(|split| split.pixels.chunks(PIXELS).map(|pixels| format!("{pixels:?}")))
            .collect();
        let mut all: Vec<_> =
            Digits::all().pixels.chunks(PIXELS).map(|pixels| format!("{pixels:?}")).collect();
        dealt.sort();
        all.sort();
        assert_eq!(dealt, all);
        for split in &splits {
            assert!((0..10).all(|digit| split.classes.contains(&digit)));
        }
    }

    #[test]
    fn a_few_steps_of_gradient_descent_learn() {
        let mut task = DigitsTask::new(1, 32, 1e-2);
        let mut parameters = task.initial();
        let before = task.evaluate(&parameters, Split::Validation).unwrap();
        for step in 0..150 {
            task.take_gradient(&parameters, BatchId(step)).unwrap();
            parameters.iter_mut().zip(task.gradient()).for_each(|(p, g)| *p -= 0.1 * g);
        }
        let after = task.evaluate(&parameters, Split::Validation).unwrap();
        assert!(after.accuracy.unwrap() > 0.85, "{before:?} {after:?}");
        assert!(after.loss < 0.5 * before.loss, "{before:?} {after:?}");
    }
}
