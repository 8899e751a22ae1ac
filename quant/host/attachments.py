"""Keys of the attachments that loading puts on a MODEL; clones by other nodes keep them."""

SOURCE = "svdquant.source"  # the file's name, as the user selected it
CARD = "svdquant.card"  # the file's card.of_source
