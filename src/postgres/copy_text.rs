//! The text form of COPY: one row a line, tabs between its fields.
//! See <https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.3.55.9.2>.

use bytes::{BufMut, BytesMut};

/// Appends a value that is not NULL to a line, escaped.
pub fn field(line: &mut BytesMut, value: &[u8]) {
    let mut rest = value;
    while let Some(at) = rest.iter().position(|byte| matches!(byte, b'\\' | b'\n' | b'\r' | b'\t')) {
        let (plain, special) = rest.split_at(at);
        line.put_slice(plain);
        line.put_u8(b'\\');
        line.put_u8(match special.first() {
            Some(b'\n') => b'n',
            Some(b'\r') => b'r',
            Some(b'\t') => b't',
            _ => b'\\',
        });
        rest = special.get(1..).unwrap_or_default();
    }
    line.put_slice(rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_a_copy_are_escaped() {
        let mut line = BytesMut::new();
        field(&mut line, b"a\tb\nc\rd\\N");
        assert_eq!(&line[..], br"a\tb\nc\rd\\N");
    }
}
