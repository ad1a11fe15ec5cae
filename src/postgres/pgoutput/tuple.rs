//! Rows, left where they were received.

use bytes::{BufMut, Bytes, BytesMut};

use super::Malformed;
use super::reader::Cursor;

/// One row, or the part of it that was sent.
#[derive(Clone, PartialEq, Eq)]
pub struct Tuple {
    /// From the first column's kind byte to the last column's last byte; checked when decoded.
    data: Bytes,
    columns: u16,
}

impl std::fmt::Debug for Tuple {
    /// Says how much there is, never what: rows stay out of logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tuple({} columns, {} bytes)", self.columns, self.data.len())
    }
}

/// The value of one column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    /// NULL
    Null,
    /// A TOASTed value that the UPDATE did not touch: the target has it already.
    Unchanged,
    /// As the type's output function printed it.
    Text(&'a [u8]),
    /// As the type's send function wrote it.
    Binary(&'a [u8]),
}

impl Tuple {
    /// Takes the row at the cursor, which is a part of `whole`.
    pub(super) fn take(cursor: &mut Cursor<'_>, whole: &Bytes) -> Result<Self, Malformed> {
        let columns = cursor.u16("the number of columns")?;
        let start = cursor.rest();
        for _ in 0..columns {
            value(cursor)?;
        }
        let data = start.get(..start.len() - cursor.rest().len()).unwrap_or_default();
        Ok(Self { data: whole.slice_ref(data), columns })
    }

    /// How many columns were sent.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::from(self.columns)
    }

    /// Whether no column was sent: a row of a table without columns.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.columns == 0
    }

    /// Bytes that the row holds on to.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// The row as it was sent. Two rows of one relation with equal bytes look the same in every column.
    #[must_use]
    pub fn as_sent(&self) -> &[u8] {
        &self.data
    }

    /// Whether a value was left out.
    #[must_use]
    pub fn leaves_out(&self) -> bool {
        self.values().any(|value| value == Value::Unchanged)
    }

    /// This row, with the values that it leaves out taken from an earlier state of the row.
    #[must_use]
    pub fn over(&self, earlier: &Self) -> Self {
        let mut data = BytesMut::with_capacity(self.data.len() + earlier.data.len());
        for (value, before) in self.values().zip(earlier.values()) {
            let (kind, bytes) = match if value == Value::Unchanged { before } else { value } {
                Value::Null => (b'n', None),
                Value::Unchanged => (b'u', None),
                Value::Text(bytes) => (b't', Some(bytes)),
                Value::Binary(bytes) => (b'b', Some(bytes)),
            };
            data.put_u8(kind);
            if let Some(bytes) = bytes {
                // It came with a length of 32 bits.
                data.put_u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
                data.put_slice(bytes);
            }
        }
        Self { data: data.freeze(), columns: self.columns }
    }

    /// The values, in the relation's order.
    pub fn values(&self) -> impl Iterator<Item = Value<'_>> {
        let mut cursor = Cursor::new(&self.data);
        // The data was walked once when it was decoded, so the error case is never reached.
        (0..self.columns).map_while(move |_| value(&mut cursor).ok())
    }
}

fn value<'a>(cursor: &mut Cursor<'a>) -> Result<Value<'a>, Malformed> {
    Ok(match cursor.u8("the kind of a value")? {
        b'n' => Value::Null,
        b'u' => Value::Unchanged,
        b't' => Value::Text(cursor.sized("a value")?),
        b'b' => Value::Binary(cursor.sized("a value")?),
        byte => return Err(Malformed::Unknown { what: "kind of value", byte }),
    })
}
