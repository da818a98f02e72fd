//! Curves as SVG.

use std::path::Path;

use plotters::prelude::*;
use sanderling_server::results::Evaluation;

/// Why a plot cannot be drawn.
#[derive(Debug, thiserror::Error)]
#[error("cannot draw {path}: {reason}")]
pub struct PlotError {
    path: String,
    reason: String,
}

/// A series: its name, its colour and its points.
type Series<'a> = (&'a str, RGBColor, Vec<(f64, f64)>);

/// What the axes are.
#[derive(Clone, Copy)]
struct Axes<'a> {
    x: &'a str,
    y: &'a str,
}

/// A named line.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// In the legend.
    pub name: String,
    /// In order of x.
    pub points: Vec<(f64, f64)>,
}

/// Colours that can be told apart, also by people who confuse red and green (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 0, 0),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

/// Draws several curves; `(x, y)` name the axes.
///
/// # Errors
/// A [`PlotError`] if the file cannot be written.
pub fn plot_curves(
    path: &Path,
    title: &str,
    (x, y): (&str, &str),
    curves: &[Curve],
) -> Result<(), PlotError> {
    let colours = COLOURS.iter().cycle();
    let series: Vec<Series<'_>> = curves
        .iter()
        .zip(colours)
        .map(|(curve, &colour)| (curve.name.as_str(), colour, curve.points.clone()))
        .collect();
    draw(path, title, Axes { x, y }, &series)
        .map_err(|error| PlotError { path: path.display().to_string(), reason: error.to_string() })
}

/// Draws training and validation loss, in nats per `unit` of the text, over millions of training tokens.
///
/// # Errors
/// A [`PlotError`] if the file cannot be written.
pub fn plot_losses(
    path: &Path,
    title: &str,
    unit: &str,
    evaluations: &[Evaluation],
) -> Result<(), PlotError> {
    let million = |tokens: u64| tokens as f64 / 1e6;
    let validation = evaluations.iter().map(|e| (million(e.tokens), e.val_loss)).collect();
    // A training loss is the mean over a stretch of the run; it belongs in the stretch's middle.
    let ends = evaluations.iter().map(|e| e.tokens);
    let middles =
        std::iter::once(0).chain(ends.clone()).zip(ends).map(|(start, end)| million(start + end) / 2.0);
    let training = middles.zip(evaluations).filter_map(|(x, e)| Some((x, e.train_loss?))).collect();
    let series: [Series<'_>; 2] = [
        ("training, mean between evaluations", RGBColor(150, 160, 170), training),
        ("validation", RGBColor(0, 110, 160), validation),
    ];
    let y = format!("cross-entropy, nats per {unit}");
    let axes = Axes { x: "training tokens, millions", y: &y };
    draw(path, title, axes, &series)
        .map_err(|error| PlotError { path: path.display().to_string(), reason: error.to_string() })
}

fn draw(
    path: &Path,
    title: &str,
    axes: Axes<'_>,
    series: &[Series<'_>],
) -> Result<(), Box<dyn std::error::Error>> {
    let points = || series.iter().flat_map(|(_, _, points)| points);
    let right = points().map(|p| p.0).fold(0.0, f64::max).max(1e-6) * 1.02;
    let bottom = points().map(|p| p.1).fold(f64::INFINITY, f64::min);
    let top = points().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
    let (bottom, top) = if bottom < top { (bottom, top) } else { (bottom.min(0.0), bottom.max(0.0) + 1.0) };
    let margin = (top - bottom) * 0.05;

    let root = SVGBackend::new(path, (800, 480)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 22))
        .margin(14)
        .x_label_area_size(52)
        .y_label_area_size(68)
        .build_cartesian_2d(0.0..right, bottom - margin..top + margin)?;
    chart
        .configure_mesh()
        .x_desc(axes.x)
        .y_desc(axes.y)
        .label_style(("sans-serif", 16))
        .axis_desc_style(("sans-serif", 17))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (name, colour, points) in series {
        let style = colour.stroke_width(2);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        chart.draw_series(points.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font(("sans-serif", 16))
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.2))
        .draw()?;
    root.present()?;
    Ok(())
}
