//! Figures as people read them: rounded, in order, as bars, and in their place on a page.

use std::error::Error;
use std::fmt::Write;
use std::path::Path;

/// The one in the middle; NaN of none.
pub fn median(figures: &[f64]) -> f64 {
    let mut figures = figures.to_vec();
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    match figures.len() {
        0 => f64::NAN,
        even if even.is_multiple_of(2) => (figures[middle - 1] + figures[middle]) / 2.0,
        _ => figures[middle],
    }
}

/// The least and the most.
pub fn range(figures: &[f64]) -> (f64, f64) {
    figures.iter().fold((f64::MAX, 0.0), |(least, most): (f64, f64), figure| (least.min(*figure), most.max(*figure)))
}

/// With commas, and no more digits than mean something.
pub fn thousands(figure: f64) -> String {
    let digits = format!("{:.0}", if figure >= 10_000.0 { (figure / 1_000.0).round() * 1_000.0 } else { figure });
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    groups.join(",")
}

/// What a bar stands for.
#[derive(Debug, Clone, Copy)]
pub enum Colour {
    /// Tidegate.
    Ours,
    /// Tidegate with something left out.
    OursPriced,
    /// What a server can do at the most.
    Limit,
    /// What others write.
    Others,
}

/// One bar of a plot.
#[derive(Debug, Clone)]
pub struct Bar {
    pub label: String,
    pub value: f64,
    /// Its value as it is written.
    pub words: String,
    /// The least and the most of several runs.
    pub range: Option<(f64, f64)>,
    pub colour: Colour,
}

/// Bars, in colours that are seen on light and on dark paper.
pub fn plot(title: &str, bars: &[Bar]) -> String {
    const ROW: usize = 30;
    const LEFT: usize = 330;
    const WIDTH: usize = 930;
    let most = bars.iter().map(|bar| bar.value).fold(f64::MIN_POSITIVE, f64::max);
    let height = 56 + bars.len() * ROW + 10;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"14\" fill=\"#808890\">\n\
         <text x=\"8\" y=\"24\" font-size=\"17\">{title}</text>\n"
    );
    for (row, bar) in bars.iter().enumerate() {
        let y = 56 + row * ROW;
        let scale = |value: f64| value / most * (WIDTH - LEFT - 110) as f64;
        let colour = match bar.colour {
            Colour::Ours => "#1f8fb5",
            Colour::OursPriced => "#7fb8cc",
            Colour::Limit => "#a0a6ac",
            Colour::Others => "#c98a3a",
        };
        let width = scale(bar.value).max(1.0);
        let _ = write!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text><rect x=\"{LEFT}\" y=\"{y}\" width=\"{width:.1}\" height=\"18\" fill=\"{colour}\"/>",
            LEFT - 10,
            y + 14,
            bar.label,
        );
        let mut end = width;
        if let Some((least, most)) = bar.range {
            let (from, to) = (LEFT as f64 + scale(least), LEFT as f64 + scale(most));
            let _ = write!(svg, "<path d=\"M{from:.1} {}H{to:.1}\" stroke=\"#606870\" stroke-width=\"2\"/>", y + 9);
            end = end.max(scale(most));
        }
        let _ = writeln!(svg, "<text x=\"{:.1}\" y=\"{}\">{}</text>", LEFT as f64 + end + 8.0, y + 14, bar.words);
    }
    svg + "</svg>\n"
}

/// Where results end on a page.
const END: &str = "<!-- end of results -->";

/// Writes what the make word printed between its marks on a page; a page that is not there becomes one of these alone.
pub fn put_on_page(page: &Path, word: &str, text: &str) -> Result<(), Box<dyn Error>> {
    let begin = format!("<!-- results: written by `make {word}` -->");
    let around = std::fs::read_to_string(page).unwrap_or_else(|_| format!("{begin}\n{END}\n"));
    let (before, rest) = around.split_once(&begin).ok_or("the page has no mark where results begin")?;
    let (_, after) = rest.split_once(END).ok_or("the page has no mark where results end")?;
    Ok(std::fs::write(page, format!("{before}{begin}\n\n{text}\n{END}{after}"))?)
}
