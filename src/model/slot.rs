//! Slot: which part of a Valkey Cluster a key lies in.
//!
//! Takes a key; gives one of 16,384 slots: the CRC-16 (XMODEM) of what stands within the key's first braces, its *hash tag*, or of
//! the whole key where there is none. So the cluster specification says. Keys of one slot are on one primary. Pure.

use std::fmt;

/// How many slots a cluster has.
pub const SLOTS: u16 = 16_384;

/// A slot of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(u16);

impl Slot {
    /// The slot of a key.
    pub fn of(key: &str) -> Slot {
        Slot(crc16(hash_tag(key).unwrap_or(key).as_bytes()) % SLOTS)
    }

    /// The slot of this number; none if there is none.
    pub fn numbered(number: u16) -> Option<Slot> {
        (number < SLOTS).then_some(Slot(number))
    }

    /// Its number, from 0.
    pub fn number(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What stands within the first braces of a key, and alone decides its slot; none where there is nothing within them.
pub fn hash_tag(key: &str) -> Option<&str> {
    let (tag, _) = key.split_once('{')?.1.split_once('}')?;
    Some(tag).filter(|tag| !tag.is_empty())
}

/// A hash tag for keys that are to lie in this key's slot: its own, or the key itself; or, where the key as a tag would mean another slot
/// (`a}b`), the least number in that slot.
pub fn tag_beside(key: &str) -> String {
    let tag = hash_tag(key).unwrap_or(key);
    let slot = Slot::of(key);
    // One that begins with a brace is no tag, even where the slot happens to be the same (`}bb}{`).
    let fits = |tag: &str| {
        let braced = format!("{{{tag}}}");
        hash_tag(&braced) == Some(tag) && Slot::of(&braced) == slot
    };
    if fits(tag) {
        return tag.to_owned();
    }
    // Some number below a few times the number of slots lies in each of them.
    (0u32..).map(|number| number.to_string()).find(|number| fits(number)).unwrap_or_default()
}

/// The CRC-16 of the cluster specification: polynomial 0x1021, initial value 0, not reflected.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(
            crc ^ (u16::from(*byte) << 8),
            |crc, _| {
                if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 }
            },
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn slots_are_those_of_the_specification() {
        assert_eq!(crc16(b"123456789"), 0x31c3);
        for (key, slot) in [("", 0), ("foo", 12_182), ("{foo}.bar", 12_182), ("a{foo}b{bar}", 12_182), ("bar", 5_061)] {
            assert_eq!(Slot::of(key).number(), slot, "{key}");
        }
        // Nothing within the first braces, or no braces that close: the whole key counts.
        assert_eq!(
            (hash_tag("a{}b{c}"), hash_tag("a{b"), hash_tag("a}b{"), hash_tag("{x}{y}")),
            (None, None, None, Some("x"))
        );
    }

    #[test]
    fn every_slot_has_a_number() {
        let mut numbered = vec![false; usize::from(SLOTS)];
        (0..400_000).for_each(|number: u32| numbered[usize::from(Slot::of(&number.to_string()).number())] = true);
        assert!(numbered.into_iter().all(|is| is));
    }

    #[test]
    fn what_is_no_tag_is_taken_for_none_though_its_slot_fits() {
        let key = "}bb}{";
        assert_eq!(Slot::of("{}bb}{}"), Slot::of(key), "by chance");
        assert_eq!(Slot::of(&format!("x:{{{}}}:{key}", tag_beside(key))), Slot::of(key));
    }

    proptest! {
        #[test]
        fn what_bears_the_tag_lies_beside_the_key(key in "[{}a-c:]{0,8}") {
            prop_assert_eq!(Slot::of(&format!("x:{{{}}}:{key}", tag_beside(&key))), Slot::of(&key));
        }
    }
}
