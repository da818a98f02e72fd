//! Zero-shot multiple choice in the format of MMLU (Hendrycks et al., 2021): CSV lines of a question, four choices and
//! the letter of the right one.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::Context;
use ndarray::Array2;
use sanderling_common::tokenizer::{Tokenizer, TokenizerError};
use sanderling_worker::kernels::Kernels;
use sanderling_worker::model::{Model, ModelError};

use super::Scoring;

/// Choices per question.
pub const CHOICES: usize = 4;

const LETTERS: [char; CHOICES] = ['A', 'B', 'C', 'D'];

/// The most questions of one file.
const QUESTIONS_MAX: usize = 1 << 20;

/// The most bytes of one file, which is read whole.
const QUESTIONS_BYTES_MAX: u64 = 1 << 30;

/// A question with its choices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// What is asked.
    pub question: String,
    /// The choices, A to D.
    pub choices: [String; CHOICES],
    /// The number of the right one.
    pub answer: usize,
}

/// Why questions cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum QuestionError {
    /// The file cannot be read as CSV.
    #[error("cannot read the questions in {path}: {source}")]
    Csv {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: csv::Error,
    },
    /// A line with another number of fields.
    #[error(
        "{path}, line {line}: {found} fields instead of 6 (question, four choices, letter of the answer)"
    )]
    Fields {
        /// The file.
        path: PathBuf,
        /// The line.
        line: u64,
        /// Its fields.
        found: usize,
    },
    /// An answer that is no letter from A to D.
    #[error("{path}, line {line}: the answer is {found:?} instead of A, B, C or D")]
    Answer {
        /// The file.
        path: PathBuf,
        /// The line.
        line: u64,
        /// What stands there.
        found: String,
    },
    /// No question.
    #[error("{0} has no questions")]
    Empty(PathBuf),
    /// More questions than are read.
    #[error("{0} has more than {QUESTIONS_MAX} questions, or more than {QUESTIONS_BYTES_MAX} bytes")]
    TooMany(PathBuf),
    /// A text that cannot be tokenised.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A question that the model's context does not hold.
    #[error("a question of {tokens} tokens does not fit the model's context of {context}")]
    TooLong {
        /// Tokens of the prompt with its longest answer.
        tokens: usize,
        /// The model's context.
        context: usize,
    },
}

/// How many of how many were answered right.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct FileScore {
    /// What was asked about.
    pub subject: String,
    /// Questions answered right.
    pub right: usize,
    /// Questions.
    pub questions: usize,
}

/// Accuracy and its standard error √(p·(1 − p)/(n − 1)); the latter is not a number for a single question.
pub fn accuracy(right: usize, questions: usize) -> (f64, f64) {
    let p = right as f64 / questions as f64;
    (p, (p * (1.0 - p) / (questions as f64 - 1.0)).sqrt())
}

/// The line, from 1, of what begins at a byte of a text, ends of lines in front of it passed over.
fn line_of(text: &[u8], byte: u64) -> u64 {
    let byte = text.len().min(byte as usize);
    let blank = text[byte..].iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
    1 + text[..byte + blank].iter().filter(|byte| **byte == b'\n').count() as u64
}

/// Reads a file of questions. A heading line (whose last field is no letter, but "answer") is passed over.
///
/// # Errors
/// A [`QuestionError`] that names the file and the line.
pub fn read_questions(path: &Path) -> Result<Vec<Question>, QuestionError> {
    let unreadable = |source| QuestionError::Csv { path: path.to_owned(), source };
    let io = |source: std::io::Error| unreadable(csv::Error::from(source));
    if std::fs::metadata(path).map_err(io)?.len() > QUESTIONS_BYTES_MAX {
        return Err(QuestionError::TooMany(path.to_owned()));
    }
    let text = std::fs::read(path).map_err(io)?;
    let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(&text[..]);
    let mut questions = Vec::new();
    for (number, record) in reader.records().enumerate() {
        let record = record.map_err(unreadable)?;
        // The library's own count is one behind where lines end with CR and LF.
        let line = || line_of(&text, record.position().map_or(0, csv::Position::byte));
        let fields: Vec<&str> = record.iter().collect();
        let Ok([question, a, b, c, d, answer]) = <[&str; CHOICES + 2]>::try_from(fields) else {
            return Err(QuestionError::Fields { path: path.to_owned(), line: line(), found: record.len() });
        };
        if number == 0 && answer.trim().eq_ignore_ascii_case("answer") {
            continue;
        }
        let letter = answer.trim();
        let place = LETTERS.iter().position(|known| letter.len() == 1 && letter.starts_with(*known));
        let answer = place.ok_or_else(|| QuestionError::Answer {
            path: path.to_owned(),
            line: line(),
            found: answer.to_owned(),
        })?;
        questions.push(Question {
            question: question.to_owned(),
            choices: [a, b, c, d].map(str::to_owned),
            answer,
        });
        if questions.len() > QUESTIONS_MAX {
            return Err(QuestionError::TooMany(path.to_owned()));
        }
    }
    if questions.is_empty() { Err(QuestionError::Empty(path.to_owned())) } else { Ok(questions) }
}

impl Question {
    /// The usual prompt, without examples; the answer follows as a space and a letter.
    fn prompt(&self, subject: &str) -> String {
        let mut prompt = format!(
            "The following are multiple choice questions (with answers) about {subject}.\n\n{}\n",
            self.question
        );
        for (letter, choice) in LETTERS.iter().zip(&self.choices) {
            prompt.push_str(&format!("{letter}. {choice}\n"));
        }
        prompt.push_str("Answer:");
        prompt
    }
}

/// A question as tokens: the prompt, and what each answer adds to it.
#[derive(Clone, Debug)]
struct Asked {
    shared: Vec<u32>,
    endings: [Vec<u32>; CHOICES],
}

impl Asked {
    /// Each answer is tokenised with its prompt, because a tokenizer may join what meets there; what all four have in
    /// common at their beginning is computed once.
    fn new(question: &Question, subject: &str, tokenizer: &Tokenizer) -> Result<Self, TokenizerError> {
        let prompt = question.prompt(subject);
        let texts = LETTERS.map(|letter| format!("{prompt} {letter}"));
        let mut encoded = Vec::with_capacity(CHOICES);
        for text in &texts {
            encoded.push(tokenizer.encode_whole(text)?);
        }
        let shortest = encoded.iter().map(Vec::len).min().unwrap_or(0);
        let same = |&place: &usize| encoded.iter().all(|tokens| tokens[place] == encoded[0][place]);
        let shared = (0..shortest).take_while(same).count();
        Ok(Self {
            shared: encoded[0][..shared].to_vec(),
            endings: std::array::from_fn(|choice| encoded[choice][shared..].to_vec()),
        })
    }

    /// Tokens that the model has to see at once.
    fn tokens(&self) -> usize {
        self.shared.len() + self.endings.iter().map(Vec::len).max().unwrap_or(0)
    }
}

/// Asks all questions on a subject and counts the right answers: the choice is the letter with the largest
/// log-likelihood after the prompt, the first of equals. `batch` sequences are computed together, those of similar length
/// side by side.
///
/// # Errors
/// A [`QuestionError`] if a question does not fit, an error of the model, or [`super::Stopped`].
pub fn answer_all<K: Kernels>(
    scoring: &Scoring<'_, K>,
    (subject, questions): (&str, &[Question]),
    tokenizer: &Tokenizer,
    batch: usize,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> anyhow::Result<FileScore>
where
    K::Buffer: Sync,
{
    let mut asked = Vec::with_capacity(questions.len());
    for question in questions {
        let one = Asked::new(question, subject, tokenizer).map_err(QuestionError::from)?;
        let (tokens, context) = (one.tokens(), scoring.config.context);
        if tokens > context {
            return Err(QuestionError::TooLong { tokens, context }.into());
        }
        asked.push((one, question.answer));
    }
    // Sequences of one batch are padded to the longest.
    asked.sort_by_key(|(one, _)| one.tokens());
    let batches: Vec<_> = asked.chunks((batch / CHOICES).max(1)).collect();
    let done: Vec<usize> = batches
        .iter()
        .scan(0, |sum, batch| {
            *sum += batch.len();
            Some(*sum)
        })
        .collect();
    let right = scoring.each(
        &batches,
        |model, parameters, batch| {
            let scores = log_likelihoods(model, parameters, batch)?;
            let is_right =
                |(scores, (_, answer)): (&[f64; CHOICES], &(Asked, usize))| best(scores) == *answer;
            let are_numbers = scores.iter().flatten().all(|score| score.is_finite());
            Ok(are_numbers.then(|| scores.iter().zip(*batch).filter(|&pair| is_right(pair)).count()))
        },
        &mut |batches| progress(if batches == 0 { 0 } else { done[batches - 1] }),
    )?;
    let right: Option<usize> = right.into_iter().sum();
    let right = right.context("the model's scores are not numbers: their computation overflows")?;
    Ok(FileScore { subject: subject.to_owned(), right, questions: questions.len() })
}

/// The log-likelihood of each answer of each question.
fn log_likelihoods<K: Kernels>(
    model: &mut Model<K>,
    parameters: &K::Buffer,
    batch: &[(Asked, usize)],
) -> Result<Vec<[f64; CHOICES]>, ModelError> {
    let single = batch
        .iter()
        .all(|(one, _)| one.endings.iter().all(|ending| ending.len() == 1) && !one.shared.is_empty());
    if single {
        return last_token_likelihoods(model, parameters, batch);
    }
    let time = batch.iter().map(|(one, _)| one.tokens()).max().unwrap_or(1) - 1;
    let sequence = |row: usize| {
        let one = &batch[row / CHOICES].0;
        one.shared.iter().chain(&one.endings[row % CHOICES]).copied().collect::<Vec<u32>>()
    };
    let sequences: Vec<Vec<u32>> = (0..batch.len() * CHOICES).map(sequence).collect();
    // What comes after the end of a sequence changes nothing before it: attention is causal.
    let at = |row: usize, place: usize| sequences[row].get(place).copied().unwrap_or(0);
    let shape = (sequences.len(), time);
    let inputs = Array2::from_shape_fn(shape, |(row, place)| at(row, place));
    let targets = Array2::from_shape_fn(shape, |(row, place)| at(row, place + 1));
    let losses = model.token_losses(parameters, inputs.view(), targets.view())?;
    let likelihood = |row: usize| {
        let shared = batch[row / CHOICES].0.shared.len();
        let places = shared.max(1) - 1..sequences[row].len() - 1;
        -places.map(|place| f64::from(losses[(row, place)])).sum::<f64>()
    };
    Ok((0..batch.len()).map(|one| std::array::from_fn(|choice| likelihood(one * CHOICES + choice))).collect())
}

/// The same where the answers differ in one token only: one sequence per question, and its last logits.
fn last_token_likelihoods<K: Kernels>(
    model: &mut Model<K>,
    parameters: &K::Buffer,
    batch: &[(Asked, usize)],
) -> Result<Vec<[f64; CHOICES]>, ModelError> {
    let time = batch.iter().map(|(one, _)| one.shared.len()).max().unwrap_or(1);
    let at = |(row, place): (usize, usize)| batch[row].0.shared.get(place).copied().unwrap_or(0);
    let inputs = Array2::from_shape_fn((batch.len(), time), at);
    let ends: Vec<(usize, usize)> =
        batch.iter().enumerate().map(|(row, (one, _))| (row, one.shared.len() - 1)).collect();
    let logits = model.logits_at(parameters, inputs.view(), &ends)?;
    // Log-likelihoods differ from logits by the same number for all choices.
    let scores = |(logits, (one, _)): (ndarray::ArrayView1<'_, f32>, &(Asked, usize))| {
        std::array::from_fn(|choice| f64::from(logits[one.endings[choice][0] as usize]))
    };
    Ok(logits.outer_iter().zip(batch).map(scores).collect())
}

/// The first of the largest.
fn best(scores: &[f64; CHOICES]) -> usize {
    (1..CHOICES).fold(0, |best, choice| if scores[choice] > scores[best] { choice } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Question>, QuestionError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("astronomy_test.csv");
        std::fs::write(&path, text).unwrap();
        read_questions(&path)
    }

    #[test]
    fn questions_are_read_with_quotes_and_with_or_without_a_heading() {
        let line = "\"What, exactly, is \"\"red\"\"?\",a colour,\"a\nfruit\",a town,a bird,A\n";
        let expected = Question {
            question: "What, exactly, is \"red\"?".to_owned(),
            choices: ["a colour", "a\nfruit", "a town", "a bird"].map(str::to_owned),
            answer: 0,
        };
        assert_eq!(read(line).unwrap(), std::slice::from_ref(&expected));
        let headed = read(&format!("question,A,B,C,D,answer\n{line}")).unwrap();
        assert_eq!(headed, std::slice::from_ref(&expected));
        assert_eq!(
            expected.prompt("astronomy"),
            "The following are multiple choice questions (with answers) about astronomy.\n\nWhat, exactly, is \
             \"red\"?\nA. a colour\nB. a\nfruit\nC. a town\nD. a bird\nAnswer:"
        );
    }

    #[test]
    fn bad_files_are_named_with_the_line() {
        let check = |text: &str, parts: &[&str]| {
            let error = read(text).unwrap_err().to_string();
            assert!(
                error.contains("astronomy_test.csv") && parts.iter().all(|part| error.contains(part)),
                "{error}"
            );
        };
        check("", &["no questions"]);
        check("q,a,b,c,d,A\nq,a,b,c,A\n", &["line 2", "5 fields"]);
        check("q,a,b,c,d,A\nq,a,b,c,d,E\n", &["line 2", "\"E\""]);
        check("q,a,b,c,d,A\r\n\"two\r\nlines\",a,b,c,d,A\r\nq,a,b,c,d,E\r\n", &["line 4", "\"E\""]);
    }

    #[test]
    fn the_standard_error_is_that_of_a_mean() {
        // Three of four right: variance 0.25·0.75·4/3 of single answers.
        let (p, error) = accuracy(3, 4);
        assert_eq!(p, 0.75);
        assert!((error - (0.1875f64 / 3.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn the_first_of_equal_choices_wins() {
        assert_eq!(best(&[0.0, 2.0, 2.0, 1.0]), 1);
        assert_eq!(best(&[0.0; 4]), 0);
    }
}
