//! Curves as SVG and PNG.

use std::error::Error;
use std::ops::Range;
use std::path::Path;
use std::sync::Once;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use sanderling_server::results::Evaluation;

/// Why a plot cannot be drawn.
#[derive(Debug, thiserror::Error)]
#[error("cannot draw {path}: {reason}")]
pub struct PlotError {
    path: String,
    reason: String,
}

/// Pixels of a picture.
const SIZE: (u32, u32) = (800, 480);

/// What labels are drawn with in a PNG, and measured with in an SVG.
const FONT: &[u8] = include_bytes!("../../assets/DejaVuSans-subset.ttf");

/// What a plot without points says.
const NOTHING: &str = "nothing was evaluated";

/// A line as it is drawn.
struct Series<'a> {
    name: &'a str,
    look: Look,
    points: &'a [(f64, f64)],
    /// See [`Curve::spread`].
    spread: &'a [f64],
    /// See [`Curve::is_cut`].
    is_cut: bool,
}

impl Series<'_> {
    /// The outline of the band about the line: above it to the right, and below it back.
    fn band(&self) -> Vec<(f64, f64)> {
        let edge = |sign: f64| {
            let points = self.points.iter().zip(self.spread);
            points.map(move |(&(x, y), spread)| (x, y + sign * spread)).filter(is_drawable)
        };
        let mut outline: Vec<(f64, f64)> = edge(1.0).collect();
        outline.extend(edge(-1.0).collect::<Vec<_>>().into_iter().rev());
        outline
    }
}

/// How a line is told from the others.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Look {
    colour: RGBColor,
    is_dashed: bool,
}

impl Look {
    fn solid(colour: RGBColor) -> Self {
        Self { colour, is_dashed: false }
    }

    /// Of the lines of a picture in their order: the colours, and when they are used up the colours again, dashed.
    fn of(place: usize) -> Self {
        Self { colour: COLOURS[place % COLOURS.len()], is_dashed: place >= COLOURS.len() }
    }

    /// A piece of the line for the legend, to the right of a place; of a dashed one a single dash.
    fn sample(self, (x, y): (i32, i32)) -> PathElement<(i32, i32)> {
        let length = if self.is_dashed { DASH.0 as i32 } else { LEGEND_DASH };
        PathElement::new([(x, y), (x + length, y)], self.colour.stroke_width(2))
    }
}

/// Lengths of a dash and of the gap after it, in pixels.
const DASH: (u32, u32) = (8, 5);

/// What the axes are.
#[derive(Clone, Copy)]
struct Axes<'a> {
    x: &'a str,
    y: &'a str,
}

/// How much of what is below a band is hidden by it.
const BAND_OPACITY: f64 = 0.13;

/// A named line.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// In the legend.
    pub name: String,
    /// In order of x.
    pub points: Vec<(f64, f64)>,
    /// The standard deviation of each point, for a band about the line; empty where there is none.
    pub spread: Vec<f64>,
    /// If it is not to be told from the others by its place among them.
    look: Option<Look>,
    /// Whether the first point is where the line comes into the picture, and no point of its own.
    is_cut: bool,
}

impl Curve {
    /// A line without a band.
    pub fn of(name: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.into(), points, spread: Vec::new(), look: None, is_cut: false }
    }

    /// The means of several seeds: x, y, and the standard deviation of y, where there is one.
    pub fn of_means(
        name: impl Into<String>,
        means: impl IntoIterator<Item = (f64, f64, Option<f64>)>,
    ) -> Self {
        let (points, spread): (Vec<_>, Vec<_>) =
            means.into_iter().map(|(x, y, spread)| ((x, y), spread)).unzip();
        // Of a single seed there is none.
        let spread = spread.into_iter().collect::<Option<Vec<f64>>>().unwrap_or_default();
        Self { name: name.into(), points, spread, look: None, is_cut: false }
    }

    /// The same in black (0) or one of the other colours, by number and over again, dashed or not; for lines that belong
    /// together.
    #[must_use]
    pub fn drawn_as(self, colour: usize, is_dashed: bool) -> Self {
        let others = &COLOURS[1..];
        let colour = colour.checked_sub(1).map_or(COLOURS[0], |place| others[place % others.len()]);
        Self { look: Some(Look { colour, is_dashed }), ..self }
    }

    /// Without what is higher at first, from where the line comes down through `top` for good.
    fn below(mut self, top: f64) -> Self {
        let Some(last) = self.points.iter().rposition(|&(_, y)| y > top) else { return self };
        let Some(&after) = self.points.get(last + 1) else { return self };
        let before = self.points[last];
        let part = (before.1 - top) / (before.1 - after.1);
        // A point of its own may lie just there, and where there is no number there is no line.
        self.is_cut = part < 1.0;
        let first = if self.is_cut { last } else { last + 1 };
        if self.is_cut {
            self.points[last] = (before.0 + part * (after.0 - before.0), top);
            if let Some(&to) = self.spread.get(last + 1) {
                self.spread[last] += part * (to - self.spread[last]);
            }
        }
        self.points.drain(..first);
        self.spread.drain(..first.min(self.spread.len()));
        self
    }
}

/// The share of a picture of losses, from its beginning, that does not decide how high it is.
const BEGINNING: f64 = 1.0 / 3.0;

/// Curves that fall, cut off at the height that none of them exceeds after the beginning: what is fallen first would press
/// together what they differ by in the end.
pub fn without_beginnings(curves: Vec<Curve>) -> Vec<Curve> {
    let points = || curves.iter().flat_map(|curve| &curve.points).filter(|point| is_drawable(point));
    let right = points().map(|point| point.0).fold(0.0, f64::max);
    let later = points().filter(|point| point.0 >= BEGINNING * right).map(|point| point.1);
    let top = later.fold(f64::NEG_INFINITY, f64::max);
    curves.into_iter().map(|curve| curve.below(top)).collect()
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

/// Draws several curves; `(x, y)` name the axes. What kind of picture it is, the name's ending says: `.png`, or SVG.
///
/// # Errors
/// A [`PlotError`] if the file cannot be written.
pub fn plot_curves(
    path: &Path,
    title: &str,
    (x, y): (&str, &str),
    curves: &[Curve],
) -> Result<(), PlotError> {
    let series: Vec<Series<'_>> = (curves.iter().enumerate())
        .map(|(place, Curve { name, points, spread, look, is_cut })| {
            let look = look.unwrap_or_else(|| Look::of(place));
            Series { name, look, points, spread, is_cut: *is_cut }
        })
        .collect();
    write(path, title, Axes { x, y }, &series)
}

fn write(path: &Path, title: &str, axes: Axes<'_>, series: &[Series<'_>]) -> Result<(), PlotError> {
    let frame = Frame::around(series);
    let legend = legend_corner(series, &frame);
    // A legend that would cover something stands beside the picture.
    let size = (SIZE.0 + if legend.is_none() { legend_width(series) as u32 } else { 0 }, SIZE.1);
    let picture = Picture { title, axes, series, frame, legend };
    let drawn = if path.extension().is_some_and(|extension| extension == "png") {
        picture.draw(&BitMapBackend::new(path, size).into_drawing_area())
    } else {
        picture.draw(&SVGBackend::new(path, size).into_drawing_area())
    };
    drawn.map_err(|error| PlotError { path: path.display().to_string(), reason: error.to_string() })
}

fn register_the_font() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let registered = register_font("sans-serif", FontStyle::Normal, FONT);
        assert!(registered.is_ok(), "the font that is compiled in cannot be read");
    });
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
    let validation: Vec<_> = evaluations.iter().map(|e| (million(e.tokens), e.val_loss)).collect();
    // A training loss is the mean over a stretch of the run; it belongs in the stretch's middle.
    let ends = evaluations.iter().map(|e| e.tokens);
    let middles =
        std::iter::once(0).chain(ends.clone()).zip(ends).map(|(start, end)| million(start + end) / 2.0);
    let training: Vec<_> = middles.zip(evaluations).filter_map(|(x, e)| Some((x, e.train_loss?))).collect();
    let line = |name, colour, points| {
        let look = Look::solid(colour);
        Series { name, look, points, spread: &[], is_cut: false }
    };
    let series = [
        line("training, mean between evaluations", RGBColor(150, 160, 170), &training),
        line("validation", RGBColor(0, 110, 160), &validation),
    ];
    let y = format!("cross-entropy, nats per {unit}");
    let axes = Axes { x: "training tokens, millions", y: &y };
    write(path, title, axes, &series)
}

/// The largest magnitude of a point that is drawn: up to here differences are far from overflowing, and labels from
/// filling the picture.
const COORDINATE_MAX: f64 = 1e30;

/// Whether a coordinate can be drawn. plotters looks for the ticks of an axis that is not finite for ever.
fn is_drawable(&(x, y): &(f64, f64)) -> bool {
    x.abs() <= COORDINATE_MAX && y.abs() <= COORDINATE_MAX
}

/// An interval of positive length that holds all values; one of length 1 if there is none.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    // Ticks that lie closer than this would have the same labels, or be the same number.
    let length_min = 1e-6 * low.abs().max(high.abs()).max(1.0);
    match high - low {
        _ if low > high => (0.0, 1.0),
        length if length < length_min => (low - length_min, high + length_min),
        _ => (low, high),
    }
}

/// Significant digits of an axis's length that its ticks are told apart by; they lie a tenth of it apart, or more.
const TICK_DIGITS: i32 = 3;

/// A tick of an axis of that length, without the zeros that plotters would add to a whole number, and without what a sum of
/// tenths has at its end.
fn tick(value: f64, length: f64) -> String {
    if value.abs() >= 1e9 {
        return format!("{value:.3e}");
    }
    let decimals = (TICK_DIGITS - 1 - length.log10().floor() as i32).clamp(0, 12) as usize;
    let text = format!("{value:.decimals$}");
    let text = if decimals > 0 { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

/// About what is between the axes, and what a letter of the legend, a line of it, and what stands beside its names take, in
/// pixels.
const PLOT: (f64, f64) = (704.0, 364.0);
const LEGEND_LETTER: f64 = 7.5;
const LEGEND_LINE: f64 = 21.0;
const LEGEND_MARGIN: f64 = 45.0;

/// Pixels.
fn legend_width(series: &[Series<'_>]) -> f64 {
    let letters = series.iter().map(|series| series.name.chars().count()).max().unwrap_or(0);
    LEGEND_MARGIN + LEGEND_LETTER * letters as f64
}

/// The corner where the legend covers nothing, if there is one.
fn legend_corner(series: &[Series<'_>], frame: &Frame) -> Option<SeriesLabelPosition> {
    let width = legend_width(series) / PLOT.0;
    let height = LEGEND_LINE * (series.len() + 1) as f64 / PLOT.1;
    let share = |value: f64, of: &Range<f64>| (value - of.start) / (of.end - of.start);
    // Lines between points count, too: each segment is looked at in so many places.
    const PLACES: u32 = 16;
    let places: Vec<(f64, f64)> = (series.iter())
        .flat_map(|series| series.points.windows(2).filter(|ends| ends.iter().all(is_drawable)))
        .flat_map(|ends| {
            (0..=PLACES).map(|place| {
                let along = f64::from(place) / f64::from(PLACES);
                let between = |from: f64, to: f64| from + along * (to - from);
                let (x, y) = (between(ends[0].0, ends[1].0), between(ends[0].1, ends[1].1));
                (share(x, &frame.across), share(y, &frame.up))
            })
        })
        .collect();
    let covered = |is_right: bool, is_upper: bool| {
        let is_covered = |&&(x, y): &&(f64, f64)| {
            (if is_right { 1.0 - x } else { x }) < width && (if is_upper { 1.0 - y } else { y }) < height
        };
        places.iter().any(|place| is_covered(&place))
    };
    // Losses fall, so that the first is the usual one.
    let corners = [
        (SeriesLabelPosition::UpperRight, covered(true, true)),
        (SeriesLabelPosition::LowerLeft, covered(false, false)),
        (SeriesLabelPosition::UpperLeft, covered(false, true)),
        (SeriesLabelPosition::LowerRight, covered(true, false)),
    ];
    corners.into_iter().find(|(_, is_covered)| !is_covered).map(|(corner, _)| corner)
}

/// What of the plane is shown.
#[derive(Clone, Debug, PartialEq)]
struct Frame {
    across: Range<f64>,
    up: Range<f64>,
}

impl Frame {
    /// From 0 to beyond the last point, and with a margin about lines and bands.
    fn around(series: &[Series<'_>]) -> Self {
        let points = || series.iter().flat_map(|series| series.points).filter(|point| is_drawable(point));
        let right = match points().map(|point| point.0).fold(0.0, f64::max) {
            right if right > 1e-6 => 1.02 * right,
            // All lies at 0, and ticks closer to it than 1 would have labels of many zeros.
            _ => 1.0,
        };
        let of_bands = series.iter().flat_map(|series| series.band()).map(|point| point.1);
        let (bottom, top) = range(points().map(|point| point.1).chain(of_bands));
        let margin = (top - bottom) * 0.05;
        Self { across: 0.0..right, up: bottom - margin..top + margin }
    }
}

/// All that is drawn.
struct Picture<'a> {
    title: &'a str,
    axes: Axes<'a>,
    series: &'a [Series<'a>],
    frame: Frame,
    /// Beside the picture, if in none of its corners.
    legend: Option<SeriesLabelPosition>,
}

/// Where the legend beside a picture begins, in pixels from its top, and what the lines in it take.
const LEGEND_TOP: i32 = 48;
const LEGEND_DASH: i32 = 18;

impl Picture<'_> {
    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Result<(), Box<dyn Error>>
    where
        B::ErrorType: 'static,
    {
        register_the_font();
        root.fill(&WHITE)?;
        let (picture, beside) = root.split_horizontally(SIZE.0);
        self.draw_lines(&picture)?;
        if self.legend.is_none() {
            for (place, series) in self.series.iter().enumerate() {
                let y = LEGEND_TOP + (LEGEND_LINE * place as f64) as i32;
                beside.draw(&series.look.sample((0, y + 8)))?;
                beside.draw(&Text::new(series.name, (LEGEND_DASH + 8, y), ("sans-serif", 16)))?;
            }
        }
        root.present()?;
        Ok(())
    }

    fn draw_lines<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Result<(), Box<dyn Error>>
    where
        B::ErrorType: 'static,
    {
        let Frame { across, up } = &self.frame;
        let mut chart = ChartBuilder::on(root)
            .caption(self.title, ("sans-serif", 22))
            .margin(14)
            .x_label_area_size(52)
            .y_label_area_size(68)
            .build_cartesian_2d(across.clone(), up.clone())?;
        chart
            .configure_mesh()
            .x_desc(self.axes.x)
            .y_desc(self.axes.y)
            .x_label_formatter(&|&x| tick(x, across.end - across.start))
            .y_label_formatter(&|&y| tick(y, up.end - up.start))
            .label_style(("sans-serif", 16))
            .axis_desc_style(("sans-serif", 17))
            .light_line_style(TRANSPARENT)
            .draw()?;
        for series in self.series {
            let (band, style) = (series.band(), series.look.colour.mix(BAND_OPACITY).filled());
            chart.draw_series((!band.is_empty()).then(|| Polygon::new(band, style)))?;
        }
        let mut is_empty = true;
        for &Series { name, look, points, is_cut, .. } in self.series {
            let style = look.colour.stroke_width(2);
            let drawable = || points.iter().copied().filter(is_drawable);
            is_empty &= drawable().next().is_none();
            let line = match look.is_dashed {
                false => chart.draw_series(LineSeries::new(drawable(), style))?,
                true => chart.draw_series(DashedLineSeries::new(drawable(), DASH.0, DASH.1, style))?,
            };
            line.label(name).legend(move |from| look.sample(from));
            let own = points.iter().skip(usize::from(is_cut)).copied().filter(is_drawable);
            chart.draw_series(own.map(|point| Circle::new(point, 3, look.colour.filled())))?;
        }
        if is_empty {
            root.draw(&Text::new(NOTHING, (330, 210), ("sans-serif", 22)))?;
        }
        if let Some(corner) = &self.legend {
            chart
                .configure_series_labels()
                .position(corner.clone())
                .label_font(("sans-serif", 16))
                .background_style(WHITE.mix(0.8))
                .border_style(BLACK.mix(0.2))
                .draw()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use sanderling_server::results::{Subject, Traffic};

    use super::*;

    fn evaluation(tokens: u64, val_loss: f64, train_loss: Option<f64>) -> Evaluation {
        let subject = Subject { method: "dgs".to_owned(), workers: 1, parameters: 1, active_parameters: 1 };
        Evaluation {
            subject,
            steps: tokens,
            tokens,
            val_loss,
            best_val_loss: val_loss,
            train_loss,
            traffic: Traffic::default(),
            staleness_mean: 0.0,
            staleness_max: 0,
            seconds: 0.0,
            tokens_per_second: 0.0,
            expert_share: Vec::new(),
            router_entropy: Vec::new(),
            dropped_share: None,
        }
    }

    #[test]
    fn a_png_has_labels_and_lines() {
        let folder = tempfile::tempdir().unwrap();
        let pictures = ["short", "x"].map(|label| {
            let path = folder.path().join(format!("{label}.png"));
            let curve = Curve::of(label, vec![(0.0, 1.0), (1.0, 2.0)]);
            plot_curves(&path, "θ ≤ 1", (label, "loss"), &[curve]).unwrap();
            std::fs::read(path).unwrap()
        });
        assert!(pictures[0].starts_with(b"\x89PNG") && pictures[0].len() > 3000, "{}", pictures[0].len());
        assert_ne!(pictures[0], pictures[1], "the labels are drawn");
    }

    #[test]
    fn black_is_of_one_line_only() {
        let colour = |number| Curve::of("", Vec::new()).drawn_as(number, false).look.unwrap().colour;
        assert_eq!(colour(0), COLOURS[0]);
        assert!((1..20).all(|number| colour(number) != COLOURS[0]));
        assert_eq!((colour(1), colour(6), colour(7)), (COLOURS[1], COLOURS[6], COLOURS[1]));
    }

    #[test]
    fn ticks_are_as_short_as_they_can_be() {
        assert_eq!(tick(1000.0, 8000.0), "1000");
        assert_eq!((tick(0.0, 8.0), tick(-0.0, 8.0)), ("0".to_owned(), "0".to_owned()));
        assert_eq!((tick(2.5, 4.0), tick(3.0, 4.0)), ("2.5".to_owned(), "3".to_owned()));
        assert_eq!((tick(0.1 + 0.2, 0.5), tick(1.4525, 0.03)), ("0.3".to_owned(), "1.4525".to_owned()));
        assert_eq!(tick(2e12, 5e12), "2.000e12");
    }

    #[test]
    fn the_legend_keeps_out_of_the_lines_way() {
        let corner = |points: &[&[(f64, f64)]]| {
            let series: Vec<_> = (points.iter())
                .map(|points| Series {
                    name: "a name",
                    look: Look::of(0),
                    points,
                    spread: &[],
                    is_cut: false,
                })
                .collect();
            legend_corner(&series, &Frame { across: 0.0..10.0, up: 0.0..1.0 })
        };
        let falling: &[_] = &[(0.0, 1.0), (2.0, 0.4), (10.0, 0.3)];
        let rising: &[_] = &[(0.0, 0.0), (10.0, 1.0)];
        let level: &[_] = &[(0.0, 0.9), (10.0, 0.9)];
        assert_eq!(corner(&[falling]), Some(SeriesLabelPosition::UpperRight));
        assert_eq!(corner(&[rising]), Some(SeriesLabelPosition::UpperLeft));
        assert_eq!(corner(&[falling, rising]), Some(SeriesLabelPosition::LowerRight));
        assert_eq!(corner(&[]), Some(SeriesLabelPosition::UpperRight));
        assert_eq!(corner(&[falling, rising, level, &[(0.0, 0.1), (10.0, 0.1)]]), None);
    }

    #[test]
    fn a_legend_that_finds_no_corner_stands_beside_the_picture() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("beside.svg");
        let width = |heights: &[f64]| {
            let level = |&y: &f64| Curve::of("a name", vec![(0.0, y), (1.0, y)]);
            let curves: Vec<Curve> = heights.iter().map(level).collect();
            plot_curves(&path, "levels", ("x", "y"), &curves).unwrap();
            let svg = std::fs::read_to_string(&path).unwrap();
            assert!(svg.matches("a name").count() == heights.len(), "{svg}");
            svg[..60].to_owned()
        };
        assert!(width(&[1.0, 2.0]).contains("width=\"890\""), "{}", width(&[1.0, 2.0]));
        assert!(width(&[1.0]).contains("width=\"800\""), "{}", width(&[1.0]));
    }

    #[test]
    fn what_falls_first_is_cut_off() {
        let of = |ys: &[f64]| {
            let points = ys.iter().enumerate().map(|(x, &y)| (x as f64, y, Some(y / 10.0)));
            Curve::of_means("", points)
        };
        let cut = without_beginnings(vec![of(&[8.0, 4.0, 2.0, 1.0]), of(&[3.0, 3.0, 2.5, 2.0])]);
        // From the second point on nothing is above 4.
        assert_eq!((&cut[0].points[..], cut[0].is_cut), (&[(1.0, 4.0), (2.0, 2.0), (3.0, 1.0)][..], false));
        assert_eq!(cut[0].spread, [0.4, 0.2, 0.1]);
        assert_eq!((cut[1].points.len(), cut[1].is_cut), (4, false));
        let between = without_beginnings(vec![of(&[8.0, 4.0]), of(&[6.0, 6.0])]);
        assert_eq!((between[0].points[0], between[0].is_cut), ((0.5, 6.0), true));
        assert!((between[0].spread[0] - 0.6).abs() < 1e-9, "{:?}", between[0].spread);
        let nothing = vec![of(&[f64::NAN]), Curve::of("", Vec::new())];
        assert_eq!(without_beginnings(nothing.clone())[1], nothing[1]);
    }

    #[test]
    fn many_lines_can_be_told_apart() {
        let looks = (0..2 * COLOURS.len()).map(Look::of).map(|look| (look.colour, look.is_dashed));
        let looks: Vec<_> = looks.collect();
        assert!(looks.iter().enumerate().all(|(place, look)| !looks[..place].contains(look)), "{looks:?}");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("many.svg");
        let curve = |name: usize| Curve::of(name.to_string(), vec![(0.0, 1.0), (9.0, 2.0)]);
        let lines = |count: usize| {
            plot_curves(&path, "many", ("x", "y"), &(0..count).map(curve).collect::<Vec<_>>()).unwrap();
            std::fs::read_to_string(&path).unwrap().matches("<polyline").count()
        };
        assert!(lines(COLOURS.len() + 1) > lines(COLOURS.len()) + 10, "the eighth line is made of dashes");
    }

    #[test]
    fn spread_is_a_band_about_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("band.svg");
        let bands = |spread: Option<f64>| {
            let means = [(0.0, 1.0, spread), (4.0, f64::NAN, spread), (9.0, 2.0, spread)];
            plot_curves(&path, "means", ("x", "y"), &[Curve::of_means("mean", means)]).unwrap();
            let svg = std::fs::read_to_string(&path).unwrap();
            // Two points above the line and two below it.
            svg.lines().filter(|line| line.contains("<polygon") && line.contains("opacity=\"0.13\"")).count()
        };
        assert_eq!((bands(Some(0.5)), bands(None)), (1, 0));
    }

    fn drawn(evaluations: &[Evaluation]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loss.svg");
        plot_losses(&path, "a run", "character", evaluations).unwrap();
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_run_without_a_point_to_draw_still_has_its_plot() {
        let nan = [evaluation(10, f64::NAN, Some(f64::NAN)), evaluation(20, f64::INFINITY, None)];
        for evaluations in [&[][..], &nan] {
            let svg = drawn(evaluations);
            assert!(svg.contains(NOTHING) && !svg.contains("<circle"), "{svg}");
        }
    }

    #[test]
    fn points_that_are_not_finite_or_coincide_do_no_harm() {
        let extreme = |loss| [evaluation(0, loss, Some(loss)), evaluation(u64::MAX, loss, Some(f64::NAN))];
        for loss in [0.0, -2.5, 1e-300, 1e29, f64::MAX] {
            let drawable = if loss < f64::MAX { 3 } else { 0 };
            assert_eq!(drawn(&extreme(loss)).matches("<circle").count(), drawable, "{loss}");
        }
        let svg = drawn(&[evaluation(10, 2.5, None)]);
        assert_eq!(svg.matches("<circle").count(), 1, "{svg}");
        assert!(!svg.contains(NOTHING));
    }
}
