"""Names of the attachments that a MODEL has from its file, and keeps through other nodes."""

SOURCE = "svdquant.source"  # the file's name, as the user chose it
CARD = "svdquant.card"  # card.of_source of the file
