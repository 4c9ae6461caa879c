//! Rows: the entries of a batch become rows of the pipeline's tables, each folded to one delta a value. Pure.
//!
//! Takes a batch and a [`Plan`], which is a pipeline made ready; gives columns that the flush's statement unpacks, and what is to be buried. An entry lands
//! in all tables of its pipeline or in none. It fails only where a folded delta leaves its range.

use std::hash::BuildHasher;
use std::ops::Range;
use std::sync::Arc;

use hashbrown::HashTable;
use jiff::Timestamp;

use super::batch::{Batch, Death};
use super::coalesce::{Coalesced, Columns};
use crate::merge::{Fold, Merge, Packed};
use crate::model::datum::{self, Calendar, Datum};
use crate::model::entry::{Canonical, EntryId, Malformed};
use crate::model::pipeline::Pipeline;
use crate::model::target::{Kind, Part};
use crate::retry::Fault;

/// A pipeline, made ready to read entries.
#[derive(Debug, Clone)]
pub enum Plan {
    /// A counter a row: the fields of its key and of its delta.
    Counter(Arc<Pipeline>),
    /// Tables with keys and values of any kind.
    Tables(Arc<Tables>),
}

/// A time zone that is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no time zone: write an IANA name such as Europe/Berlin, or UTC")]
pub struct NoZone(String);

/// Tables whose columns say what they are made of.
#[derive(Debug)]
pub struct Tables {
    /// The fields that are needed, by name.
    fields: Vec<Vec<u8>>,
    /// Each way in which one of them is read, once.
    reads: Vec<Read>,
    /// Those that must bring something.
    required: Vec<usize>,
    tables: Vec<TablePlan>,
}

#[derive(Debug, PartialEq, Eq)]
struct Read {
    field: usize,
    kind: Kind,
}

/// What was found of an entry, by field, and what was read of that. It is used again for the next entry.
#[derive(Debug, Default)]
struct Reading<'a> {
    found: Vec<Option<&'a [u8]>>,
    data: Vec<Option<Datum<'a>>>,
}

#[derive(Debug)]
struct TablePlan {
    keys: Vec<KeyPlan>,
    values: Vec<ValuePlan>,
}

#[derive(Debug)]
enum KeyPlan {
    /// What was read so, and how.
    Read(usize, Kind),
    /// The stretch that the moment read so lies in; none: that of the entry's id.
    Stretch(Option<usize>, Calendar),
}

#[derive(Debug)]
struct ValuePlan {
    merge: Merge,
    kind: Kind,
    /// What was read so; none: the entry itself counts.
    read: Option<usize>,
    is_optional: bool,
}

impl Plan {
    /// Of this pipeline.
    pub fn of(pipeline: &Pipeline) -> Result<Plan, NoZone> {
        if pipeline.tables.is_empty() {
            return Ok(Plan::Counter(Arc::new(pipeline.clone())));
        }
        let mut all = Tables { fields: Vec::new(), reads: Vec::new(), required: Vec::new(), tables: Vec::new() };
        for target in pipeline.targets() {
            let mut keys = Vec::new();
            for key in &target.keys {
                keys.push(match &key.part {
                    Part::Field(name, kind) => KeyPlan::Read(all.read(name, *kind), *kind),
                    Part::Bucket { unit, field, zone } => {
                        let calendar = Calendar::of(*unit, zone).ok_or_else(|| NoZone(zone.clone()))?;
                        KeyPlan::Stretch(field.as_ref().map(|name| all.read(name, Kind::Timestamptz)), calendar)
                    }
                });
            }
            let values = target.values.iter().map(|value| ValuePlan {
                merge: value.merge,
                kind: value.kind(),
                read: value.field.as_ref().map(|field| all.read(&field.name, field.kind)),
                is_optional: value.field.as_ref().is_some_and(|field| field.is_optional),
            });
            let values: Vec<ValuePlan> = values.collect();
            all.required.extend(keys.iter().filter_map(|key| match key {
                KeyPlan::Read(read, _) => Some(*read),
                KeyPlan::Stretch(read, _) => *read,
            }));
            all.required.extend(values.iter().filter(|value| !value.is_optional).filter_map(|value| value.read));
            all.tables.push(TablePlan { keys, values });
        }
        Ok(Plan::Tables(Arc::new(all)))
    }

    /// Why an entry is to be buried, as far as its bytes alone tell.
    pub(crate) fn refusal_of(&self, entry: Canonical<'_>) -> Option<Death> {
        let Plan::Tables(tables) = self else { return self.key_of(entry).err() };
        let mut reading = Reading::default();
        let mut read = tables.read_all(entry, &mut reading);
        for table in &tables.tables {
            let mut stretches = vec![None; table.keys.len()];
            read = read.and_then(|()| table.key(entry.id(), &reading.data, &mut stretches, &mut Vec::new()));
        }
        read.err()
    }

    /// What an entry's rows are known by, where it can be read: for telling apart what is refused.
    pub(crate) fn key_of(&self, entry: Canonical<'_>) -> Result<Vec<u8>, Death> {
        match self {
            Plan::Counter(pipeline) => {
                let delta = crate::model::row::decode(entry, pipeline).map_err(Death::from)?;
                Ok(delta.key.as_bytes().to_vec())
            }
            Plan::Tables(tables) => {
                let (mut reading, mut key) = (Reading::default(), Vec::new());
                tables.read_all(entry, &mut reading)?;
                let first = &tables.tables[0];
                first.key(entry.id(), &reading.data, &mut vec![None; first.keys.len()], &mut key)?;
                Ok(key)
            }
        }
    }
}

impl Tables {
    /// The number of this way of reading.
    fn read(&mut self, name: &str, kind: Kind) -> usize {
        let field = self.fields.iter().position(|field| field == name.as_bytes()).unwrap_or_else(|| {
            self.fields.push(name.into());
            self.fields.len() - 1
        });
        let read = Read { field, kind };
        self.reads.iter().position(|known| *known == read).unwrap_or_else(|| {
            self.reads.push(read);
            self.reads.len() - 1
        })
    }

    /// Everything that is needed of an entry. Refused where a field cannot be read, or is missing.
    fn read_all<'a>(&self, entry: Canonical<'a>, reading: &mut Reading<'a>) -> Result<(), Death> {
        let Reading { found, data } = reading;
        found.clear();
        found.resize(self.fields.len(), None);
        for (name, value) in entry.fields() {
            if let Some(field) = self.fields.iter().position(|field| field == name)
                && found[field].replace(value).is_some()
            {
                return Err(Malformed::FieldTwice.into());
            }
        }
        data.clear();
        for Read { field, kind } in &self.reads {
            let read = found[*field].map(|bytes| datum::read(*kind, bytes)).transpose();
            data.push(read.map_err(|why| self.refused(*field, &why))?);
        }
        match self.required.iter().find(|read| data[**read].is_none()) {
            Some(missing) => {
                let name = String::from_utf8_lossy(&self.fields[self.reads[*missing].field]).into_owned();
                Err(Death { reason: "missing_field", detail: format!("the field {name} is missing") })
            }
            None => Ok(()),
        }
    }

    fn refused(&self, field: usize, why: &str) -> Death {
        let name = String::from_utf8_lossy(&self.fields[field]);
        Death { reason: "bad_field", detail: format!("the field {name} {why}") }
    }
}

/// The stretch of time that was asked for last, for each key column that is one: neighbours in a stream mostly share it.
type Stretches = Vec<Option<(String, Range<Timestamp>)>>;

impl TablePlan {
    /// Writes the key of an entry behind `out`: numbers as eight bytes, texts with their length in front. Any order of these bytes does for locking, as
    /// long as all workers have the same.
    fn key(
        &self,
        id: EntryId,
        data: &[Option<Datum<'_>>],
        stretches: &mut Stretches,
        out: &mut Vec<u8>,
    ) -> Result<(), Death> {
        for (key, memo) in self.keys.iter().zip(stretches) {
            match key {
                KeyPlan::Read(read, _) => match &data[*read] {
                    Some(Datum::Number(number)) => out.extend_from_slice(&number.to_be_bytes()),
                    Some(Datum::Moment(moment)) => write_text(&datum::spell(*moment), out),
                    Some(Datum::Text(text)) => write_text(text, out),
                    None => {}
                },
                KeyPlan::Stretch(read, calendar) => {
                    let no_moment =
                        || Death { reason: "bad_field", detail: "no stretch of time has such a moment".into() };
                    let moment = match read.and_then(|read| data[read].as_ref()) {
                        Some(Datum::Moment(moment)) => *moment,
                        _ => Timestamp::from_millisecond(id.ms.try_into().unwrap_or(i64::MAX))
                            .map_err(|_| no_moment())?,
                    };
                    if !memo.as_ref().is_some_and(|(_, stretch)| stretch.contains(&moment)) {
                        *memo = Some(calendar.stretch(moment).ok_or_else(no_moment)?);
                    }
                    write_text(memo.as_ref().map_or("", |(text, _)| text), out);
                }
            }
        }
        Ok(())
    }
}

fn write_text(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// A table's rows, as they are folded.
struct Folding<'p, 'a> {
    plan: &'p TablePlan,
    places: HashTable<usize>,
    hasher: foldhash::fast::RandomState,
    /// The keys of all rows, one behind the other, and where each lies.
    bytes: Vec<u8>,
    keys: Vec<Range<usize>>,
    /// The key of the entry at hand.
    found: Vec<u8>,
    values: Vec<Box<dyn Fold<'a> + Send + 'a>>,
    stretches: Stretches,
}

impl<'p, 'a> Folding<'p, 'a> {
    fn of(plan: &'p TablePlan, entries: usize) -> Folding<'p, 'a> {
        Folding {
            plan,
            places: HashTable::with_capacity(entries),
            hasher: foldhash::fast::RandomState::default(),
            bytes: Vec::new(),
            keys: Vec::new(),
            found: Vec::new(),
            values: plan.values.iter().map(|value| value.merge.fold(value.kind)).collect(),
            stretches: vec![None; plan.keys.len()],
        }
    }

    /// Finds the key of an entry. Refused where it has none; then nothing has changed.
    fn find_key(&mut self, id: EntryId, data: &[Option<Datum<'a>>]) -> Result<(), Death> {
        self.found.clear();
        self.plan.key(id, data, &mut self.stretches, &mut self.found)
    }

    /// The row of the key that was found last, begun if it is its first.
    fn row(&mut self) -> usize {
        let Folding { places, hasher, bytes, keys, found, .. } = self;
        let hash = hasher.hash_one(&found[..]);
        if let Some(row) = places.find(hash, |row| bytes[keys[*row].clone()] == found[..]) {
            return *row;
        }
        let (row, start) = (keys.len(), bytes.len());
        bytes.extend_from_slice(found);
        keys.push(start..bytes.len());
        places.insert_unique(hash, row, |row| hasher.hash_one(&bytes[keys[*row].clone()]));
        row
    }

    fn meet(&mut self, row: usize, id: EntryId, data: &[Option<Datum<'a>>]) -> Result<(), Fault> {
        for (fold, value) in self.values.iter_mut().zip(&self.plan.values) {
            let datum = match value.read {
                Some(read) => data[read].clone(),
                None => Some(Datum::Number(1)),
            };
            fold.meet(row, id, datum)?;
        }
        Ok(())
    }

    /// Its columns, in the order of the keys' bytes.
    fn pack(mut self, packed: &mut Packed<'a>) {
        let mut order: Vec<usize> = (0..self.keys.len()).collect();
        order.sort_unstable_by(|a, b| self.bytes[self.keys[*a].clone()].cmp(&self.bytes[self.keys[*b].clone()]));
        let mut at: Vec<usize> = order.iter().map(|row| self.keys[*row].start).collect();
        for key in &self.plan.keys {
            if matches!(key, KeyPlan::Read(_, Kind::Bigint)) {
                packed.numbers(at.iter_mut().map(|at| {
                    let number = self.bytes[*at..].first_chunk::<8>().map(|bytes| i64::from_be_bytes(*bytes));
                    *at += 8;
                    number
                }));
            } else {
                packed.texts(at.iter_mut().map(|at| {
                    let length =
                        self.bytes[*at..].first_chunk::<4>().map_or(0, |bytes| u32::from_be_bytes(*bytes)) as usize;
                    let text = String::from_utf8_lossy(&self.bytes[*at + 4..*at + 4 + length]).into_owned();
                    *at += 4 + length;
                    Some(text.into())
                }));
            }
        }
        self.values.iter_mut().for_each(|fold| fold.pack(&order, packed));
    }
}

/// Folds the entries at these indices into the rows of all tables.
pub(super) fn fold<'a>(
    batch: &'a Batch,
    plan: &Tables,
    indices: impl ExactSizeIterator<Item = usize>,
) -> Result<Coalesced<'a>, Fault> {
    let mut tables: Vec<Folding<'_, 'a>> =
        plan.tables.iter().map(|table| Folding::of(table, indices.len().min(1_000))).collect();
    let (mut dead, mut reading) = (Vec::new(), Reading::default());
    for index in indices {
        let entry = &batch.entries()[index];
        if let Some(death) = &entry.death {
            dead.push((index, death.clone()));
            continue;
        }
        // All that can be refused comes first, so that an entry lands in all tables or in none.
        let read = plan.read_all(batch.canonical(entry), &mut reading);
        let found = read.and_then(|()| tables.iter_mut().try_for_each(|table| table.find_key(entry.id, &reading.data)));
        if let Err(death) = found {
            dead.push((index, Arc::new(death)));
            continue;
        }
        for table in &mut tables {
            let row = table.row();
            table.meet(row, entry.id, &reading.data)?;
        }
    }
    let rows: Vec<usize> = tables.iter().map(|table| table.keys.len()).collect();
    let mut packed = Packed::default();
    if let [_, _, ..] = rows[..] {
        packed.numbers(rows.iter().map(|rows| i64::try_from(*rows).ok()));
    }
    tables.into_iter().for_each(|table| table.pack(&mut packed));
    Ok(Coalesced { columns: Columns::Tables { rows, packed }, dead })
}
