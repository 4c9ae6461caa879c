//! Picture: what `tidegate top` draws. Pure.
//!
//! Takes statuses as they come; draws the last one, and how the numbers went before. It cannot fail: where there is no room a part is left out.

use std::collections::{BTreeMap, VecDeque};

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Paragraph, Row, Sparkline, Table, Wrap};

use crate::ops::columns::{Paint, bytes, count, cut, lasting, lasting_ms, printable};
use crate::ops::status::reasons::Severity;
use crate::ops::status::report::{Flow, Status};

/// How many looks are remembered.
const REMEMBERED: usize = 240;

/// How the numbers of all pipelines, or of one, went.
#[derive(Debug, Default)]
struct Past {
    incoming: VecDeque<u64>,
    outgoing: VecDeque<u64>,
    backlog: VecDeque<u64>,
    age: VecDeque<u64>,
}

impl Past {
    fn add(&mut self, flow: &Flow) {
        let rate = |rate: Option<f64>| rate.map_or(0, |rate| rate.round() as u64);
        for (past, now) in [
            (&mut self.incoming, rate(flow.in_per_second)),
            (&mut self.outgoing, rate(flow.out_per_second)),
            (&mut self.backlog, flow.backlog.unwrap_or(0)),
            (&mut self.age, flow.oldest_ms.unwrap_or(0)),
        ] {
            past.push_back(now);
            if past.len() > REMEMBERED {
                past.pop_front();
            }
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Picture {
    paint: Paint,
    status: Status,
    past: BTreeMap<String, Past>,
    /// Which pipeline is shown alone; none for all.
    chosen: Option<usize>,
    is_held: bool,
}

/// The name under which the sums of all pipelines are remembered.
const ALL: &str = "";

impl Picture {
    pub(super) fn new(paint: Paint, status: Status) -> Picture {
        Picture { paint, status, past: BTreeMap::new(), chosen: None, is_held: false }
    }

    /// A look was taken.
    pub(super) fn show(&mut self, status: Status) {
        let flows: Vec<Flow> = status.pipelines.iter().map(|pipeline| pipeline.flow).collect();
        self.past.entry(ALL.into()).or_default().add(&Flow::sum(&flows));
        for pipeline in &status.pipelines {
            self.past.entry(pipeline.name.clone()).or_default().add(&pipeline.flow);
        }
        if !self.is_held {
            self.status = status;
        }
    }

    /// Shows the next pipeline alone; after the last one all of them.
    pub(super) fn next(&mut self) {
        let next = self.chosen.map_or(0, |chosen| chosen + 1);
        self.chosen = (next < self.status.pipelines.len()).then_some(next);
    }

    /// Holds the picture, or lets it go on.
    pub(super) fn hold(&mut self) {
        self.is_held = !self.is_held;
    }

    fn style(&self, color: Color) -> Style {
        match self.paint {
            Paint::Colours => Style::new().fg(color),
            Paint::Plain => Style::new(),
        }
    }

    pub(super) fn draw(&self, frame: &mut Frame<'_>) {
        let area = frame.area();
        let is_low = area.height < 16;
        let [verdict, lines, streams, people, footer] = Layout::vertical([
            Constraint::Length(if is_low { 2 } else { 3 }),
            Constraint::Length(if is_low { 0 } else { 5 }),
            Constraint::Fill(2),
            Constraint::Fill(3),
            Constraint::Length(1),
        ])
        .areas(area);
        self.draw_verdict(frame, verdict);
        self.draw_past(frame, lines);
        self.draw_streams(frame, streams);
        let [daemons, incidents] =
            Layout::horizontal([Constraint::Percentage(50), Constraint::Percentage(50)]).areas(people);
        self.draw_daemons(frame, daemons);
        self.draw_incidents(frame, incidents);
        let held = if self.is_held { "  HELD" } else { "" };
        let of = self
            .chosen
            .and_then(|n| self.status.pipelines.get(n))
            .map_or("all pipelines".into(), |p| printable(&p.name));
        let keys = format!("q quit  tab {of}  space hold{held}");
        frame.render_widget(Paragraph::new(keys).style(Style::new().add_modifier(Modifier::DIM)), footer);
    }

    fn draw_verdict(&self, frame: &mut Frame<'_>, area: Rect) {
        let color = match self.status.verdict.state {
            Severity::Ok | Severity::Notice => Color::Green,
            Severity::Degraded | Severity::Down => Color::Red,
        };
        let words = printable(&self.status.verdict.sentence);
        let style = self.style(color).add_modifier(Modifier::BOLD);
        frame.render_widget(Paragraph::new(words).style(style).wrap(Wrap { trim: true }), area);
    }

    fn draw_past(&self, frame: &mut Frame<'_>, area: Rect) {
        let name = self.chosen.and_then(|n| self.status.pipelines.get(n)).map_or(ALL, |pipeline| &pipeline.name);
        let Some(past) = self.past.get(name) else { return };
        let columns = Layout::horizontal([Constraint::Ratio(1, 4); 4]).split(area);
        let last = |past: &VecDeque<u64>| past.back().copied().unwrap_or(0);
        for (place, (title, values, color)) in columns.iter().zip([
            (format!("in/s {}", count(last(&past.incoming))), &past.incoming, Color::Cyan),
            (format!("out/s {}", count(last(&past.outgoing))), &past.outgoing, Color::Green),
            (format!("backlog {}", count(last(&past.backlog))), &past.backlog, Color::Yellow),
            (format!("oldest {}", lasting_ms(last(&past.age))), &past.age, Color::Magenta),
        ]) {
            let block = Block::new().borders(Borders::TOP).title(title);
            let width = usize::from(block.inner(*place).width);
            let shown: Vec<u64> = values.iter().skip(values.len().saturating_sub(width)).copied().collect();
            frame.render_widget(Sparkline::default().block(block).data(&shown).style(self.style(color)), *place);
        }
    }

    fn draw_streams(&self, frame: &mut Frame<'_>, area: Rect) {
        let rows = self.streams().map(|(pipeline, stream)| {
            let flow = &stream.flow;
            let or = |number: Option<u64>| number.map_or_else(|| "?".into(), count);
            let eta = match (flow.backlog, flow.eta_seconds) {
                (Some(0), _) => "-".into(),
                (_, Some(seconds)) => lasting(std::time::Duration::from_secs_f64(seconds.min(1e9))),
                _ => "?".into(),
            };
            let name = if stream.stream.starts_with("flush:") { &stream.stream } else { pipeline };
            Row::new([
                cut(&printable(name), 22),
                or(flow.backlog),
                flow.oldest_ms.map_or_else(|| "?".into(), lasting_ms),
                flow.in_per_second.map_or_else(|| "?".into(), |rate| count(rate.round() as u64)),
                flow.out_per_second.map_or_else(|| "?".into(), |rate| count(rate.round() as u64)),
                eta,
                or(stream.dead_letters),
                or(stream.ledger_rows),
            ])
        });
        let widths = [
            Constraint::Fill(1),
            Constraint::Length(9),
            Constraint::Length(7),
            Constraint::Length(8),
            Constraint::Length(8),
            Constraint::Length(7),
            Constraint::Length(6),
            Constraint::Length(7),
        ];
        let heading = Row::new(["stream", "backlog", "oldest", "in/s", "out/s", "eta", "dead", "ledger"]);
        let size = self.status.ledger_bytes.map(|size| format!(" ledger {} ", bytes(size))).unwrap_or_default();
        let block = Block::new().borders(Borders::TOP).title("streams").title(Line::from(size).right_aligned());
        let heading = heading.style(Style::new().add_modifier(Modifier::BOLD));
        frame.render_widget(Table::new(rows, widths).header(heading).block(block), area);
    }

    fn draw_daemons(&self, frame: &mut Frame<'_>, area: Rect) {
        let mut lines = Vec::new();
        for (_, stream) in self.streams() {
            for process in &stream.processes {
                let color = match process.state {
                    "flowing" => Color::Green,
                    "paused" => Color::Yellow,
                    _ => Color::Red,
                };
                lines.push(Line::from(vec![
                    Span::raw(format!("{:<16} ", cut(&printable(&process.process), 16))),
                    Span::styled(format!("{:<11} ", process.state), self.style(color)),
                    Span::raw(count(process.applied)),
                ]));
            }
            for consumer in stream.consumers.iter().filter(|consumer| consumer.entries > 0) {
                let gone = if consumer.alive { "" } else { " GONE" };
                let name = cut(&printable(&consumer.name), 16);
                lines.push(Line::raw(format!("{name:<16} holds {}{gone}", count(consumer.entries))));
            }
        }
        let block = Block::new().borders(Borders::TOP).title("daemons, entries applied, held");
        frame.render_widget(Paragraph::new(lines).block(block), area);
    }

    fn draw_incidents(&self, frame: &mut Frame<'_>, area: Rect) {
        let mut lines = Vec::new();
        for reason in &self.status.reasons {
            let color = if reason.severity > Severity::Notice { Color::Red } else { Color::Yellow };
            let of = reason.pipeline.as_deref().map(|name| format!("{name}: ")).unwrap_or_default();
            lines.push(Line::styled(printable(&format!("{of}{}", reason.words)), self.style(color)));
            lines.push(Line::raw(printable(&format!("  {}", reason.next_step))));
        }
        if lines.is_empty() {
            lines.push(Line::styled("none", self.style(Color::Green)));
        }
        let block = Block::new().borders(Borders::TOP | Borders::LEFT).title("incidents and dead letters");
        frame.render_widget(Paragraph::new(lines).block(block).wrap(Wrap { trim: false }), area);
    }

    fn streams(&self) -> impl Iterator<Item = (&String, &crate::ops::status::report::StreamStatus)> {
        let chosen = self.chosen;
        let pipelines = self.status.pipelines.iter().enumerate();
        pipelines
            .filter(move |(n, _)| chosen.is_none_or(|chosen| chosen == *n))
            .flat_map(|(_, pipeline)| pipeline.streams.iter().map(move |stream| (&pipeline.name, stream)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::status::reasons::Reason;
    use crate::ops::status::report::{PipelineStatus, Process, Server, StreamStatus, Verdict};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn status(backlog: u64) -> Status {
        let flow = Flow {
            backlog: Some(backlog),
            backlog_is_exact: true,
            oldest_ms: Some(backlog * 10),
            in_per_second: Some(120.0),
            out_per_second: Some(80.0),
            eta_seconds: None,
        };
        let process = Process {
            process: "host-17".into(),
            version: "0.1.0".into(),
            state: "halted",
            fault: Some("PostgreSQL: relation \"counters\" does not exist (42P01)".into()),
            advice: None,
            lasted_ms: 1000,
            said_ms_ago: 10,
            postgres: Some("7302/app".into()),
            workers: 2,
            reads_alone: None,
            applied: 1_234_567,
            recognised: 0,
            buried: 3,
        };
        let stream = StreamStatus {
            stream: "flush:counters\x1b[31m".into(),
            exists: Some(true),
            group_exists: Some(true),
            length: Some(9),
            memory_bytes: Some(1),
            undelivered: Some(backlog),
            pending: Some(0),
            flow,
            ledger_rows: Some(4),
            ledger_entries: Some(5),
            last_flush_ms_ago: Some(6),
            dead_letters: Some(3),
            consumers: Vec::new(),
            processes: vec![process],
        };
        let reason = Reason {
            severity: Severity::Degraded,
            code: "halted",
            pipeline: Some("counters".into()),
            stream: None,
            words: "halted for 1.0s: PostgreSQL: relation \"counters\" does not exist (42P01)".into(),
            next_step: "run `tidegate migrate`".into(),
        };
        let server = Server { reachable: true, fault: None };
        Status {
            verdict: Verdict {
                state: Severity::Degraded,
                flushing: false,
                at_risk: Some(backlog),
                oldest_ms: Some(1),
                sentence: "DEGRADED: not flushing; 7 entries behind".into(),
            },
            reasons: vec![reason],
            findings: Vec::new(),
            valkey: server.clone(),
            postgres: server,
            ledger_bytes: Some(1 << 20),
            pipelines: vec![PipelineStatus {
                name: "counters".into(),
                table: "public.counters".into(),
                tables: Vec::new(),
                delivery: "group",
                paused: Some(false),
                dead_letters: Some(3),
                flow,
                streams: vec![stream],
            }],
        }
    }

    /// The picture on a terminal of this size, as lines.
    fn drawn(picture: &Picture, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
        terminal.draw(|frame| picture.draw(frame)).expect("drawn");
        let buffer = terminal.backend().buffer().clone();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol().to_owned()).collect::<String>();
        (0..height).map(line).collect()
    }

    #[test]
    fn in_80_columns_of_24_lines_everything_that_matters_can_be_read() {
        let mut picture = Picture::new(Paint::Colours, status(0));
        for backlog in [1, 5, 7] {
            picture.show(status(backlog));
        }
        let lines = drawn(&picture, 80, 24);
        let all = lines.join("\n");
        assert!(lines[0].starts_with("DEGRADED: not flushing; 7 entries behind"), "{all}");
        for words in [
            "in/s 120",
            "out/s 80",
            "backlog 7",
            "oldest 70ms",
            "host-17",
            "halted",
            "1,234,567",
            "run `tidegate migrate`",
            "q quit",
            "█",
        ] {
            assert!(all.contains(words), "{words}: {all}");
        }
        assert!(!all.contains('\x1b'), "what came from a stream is escaped: {all}");
    }

    #[test]
    fn any_size_is_drawn_and_any_pipeline_can_be_chosen() {
        let mut picture = Picture::new(Paint::Plain, status(3));
        picture.show(status(4));
        for (width, height) in [(1, 1), (20, 5), (79, 12), (80, 24), (300, 100)] {
            assert_eq!(drawn(&picture, width, height).len(), usize::from(height));
        }
        picture.next();
        assert!(drawn(&picture, 80, 24).join("\n").contains("tab counters"));
        picture.next();
        assert!(drawn(&picture, 80, 24).join("\n").contains("tab all pipelines"));
        picture.hold();
        picture.show(status(99));
        let all = drawn(&picture, 80, 24).join("\n");
        assert!(all.contains("HELD") && all.contains("flush:counters\\u{1b}"), "{all}");
    }
}
