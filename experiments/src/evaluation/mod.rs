//! What a model is worth: its loss over a text, and its choices among answers.

mod language;
mod multiple_choice;
mod parallel;

pub use language::{LanguageScore, Windows, language_loss};
pub use multiple_choice::{
    CHOICES, FileScore, Question, QuestionError, accuracy, answer_all, read_questions,
};
pub use parallel::{Scoring, Stopped};
