//! Stored: how a row becomes bytes in the cache, and a row again.

use bytes::Bytes;

/// A row that can be cached. An empty text of bytes stands for "known to be missing" in Valkey: a row that is stored as nothing is not cached.
pub trait Stored: Sized {
    /// Its bytes; none if it cannot be stored, and is then not cached.
    fn to_bytes(&self) -> Option<Vec<u8>>;

    /// The row of these bytes; none if they are no such row (another version's, say), and it is then loaded again.
    fn from_bytes(bytes: &Bytes) -> Option<Self>;
}

impl Stored for Vec<u8> {
    fn to_bytes(&self) -> Option<Vec<u8>> {
        Some(self.clone())
    }

    fn from_bytes(bytes: &Bytes) -> Option<Vec<u8>> {
        Some(bytes.to_vec())
    }
}

impl Stored for Bytes {
    fn to_bytes(&self) -> Option<Vec<u8>> {
        Some(self.to_vec())
    }

    fn from_bytes(bytes: &Bytes) -> Option<Bytes> {
        Some(bytes.clone())
    }
}

impl Stored for String {
    fn to_bytes(&self) -> Option<Vec<u8>> {
        Some(self.as_bytes().to_vec())
    }

    fn from_bytes(bytes: &Bytes) -> Option<String> {
        String::from_utf8(bytes.to_vec()).ok()
    }
}

/// A row as JSON.
#[cfg(feature = "json")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Json<T>(pub T);

#[cfg(feature = "json")]
impl<T: serde::Serialize + serde::de::DeserializeOwned> Stored for Json<T> {
    fn to_bytes(&self) -> Option<Vec<u8>> {
        serde_json::to_vec(&self.0).ok()
    }

    fn from_bytes(bytes: &Bytes) -> Option<Json<T>> {
        serde_json::from_slice(bytes).ok().map(Json)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_comes_back_and_foreign_bytes_are_no_row() {
        let text = "naïve".to_owned();
        let bytes = Bytes::from(text.to_bytes().expect("bytes"));
        assert_eq!(String::from_bytes(&bytes), Some(text));
        assert_eq!(String::from_bytes(&Bytes::from_static(b"\xff")), None);
        #[cfg(feature = "json")]
        {
            let row = Json(vec![Some(1), None]);
            assert_eq!(Json::from_bytes(&row.to_bytes().expect("bytes").into()), Some(row));
            assert_eq!(Json::<Vec<i32>>::from_bytes(&Bytes::from_static(b"{")), None);
        }
    }
}
